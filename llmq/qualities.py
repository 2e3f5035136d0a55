"""A quality as the method that it stands for, by measurement (docs/accuracy.md).

Not here: what the steps of a method are (algorithms/), which range goes with them (recipe.py).
"""

QUALITIES = {
    "fast": "gptq,descent",
    "balanced": "qep,gptq,descent",
    "best": "fisher,qep,gptq,descent",
}
FINISHERS = {
    2: ",distill",
    3: ",distill:epochs=1:lr=0.0005:norm_lr=0.0005",
}
"""What "best" ends with, by bits of a weight; at 4 a prototype gained 1 %."""
VARIED_SHARE = 0.25
"""How much of the calibration of a quality is varied (calibration/varied.py), by measurement (docs/calibration.md)."""
OF_GGUF = QUALITIES | {"fast": "rtn", "best": QUALITIES["balanced"]}
"""Of GGUF: weighing tokens gains nothing there (docs/gguf.md)."""
OF_W8A8 = {
    "fast": "migrate:feedback=1,rtn",
    "balanced": "migrate,qep,gptq,descent",
    "best": "migrate,qep,gptq,descent",
}
