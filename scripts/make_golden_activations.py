"""Make tests/golden/activations.safetensors: activations, and what compressed-tensors makes of them at run time.

    python scripts/make_golden_activations.py tests/golden/activations.safetensors     # compressed-tensors 0.20.1

`x.DTYPE` `[1, 10, 256]` in float32, bfloat16 and float16, and `NAME.DTYPE`, the same shape, for each of the library's
preset schemes: its `forward_quantize` of the preset's `input_activations`, scales and divisors as `fixed.NAME.DTYPE`.
Tokens: zeros; some of each size; outliers; ties of E2M1; values beyond what a static scale covers.
"""

import sys

import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import save_file

SCHEMES = {
    "FP8_DYNAMIC": None,
    "FP8": "scale",
    "FP8_BLOCK": None,
    "NVFP4": "global_scale",
    "MXFP4": None,
    "MXFP8": None,
}
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]


def activations() -> torch.Tensor:
    """Return tokens of all kinds, float32 `[1, 10, 256]`."""
    x_TK = torch.randn(10, 256, generator=torch.Generator().manual_seed(0))
    x_TK[0] = 0
    x_TK[1:5] *= torch.tensor([1e-3, 1e-2, 10, 300])[:, None]
    x_TK[5, ::37] *= 50
    x_TK[6] = torch.tensor(TIES).repeat(16) * torch.logspace(-2, 3, 16, base=2).repeat_interleave(16)
    x_TK[7, 64:] = 0
    x_TK[8] *= 40
    return x_TK[None]


def main(file: str) -> None:
    """Write the file."""
    tensors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = activations().to(dtype)
        named = str(dtype).removeprefix("torch.")
        tensors[f"x.{named}"] = x
        for name, fixed in SCHEMES.items():
            module = torch.nn.Module()
            module.quantization_status = QuantizationStatus.FROZEN
            if fixed == "scale":
                module.input_scale = torch.tensor([900 / 448], dtype=dtype)
            elif fixed:
                module.input_global_scale = torch.tensor([448 * 6 / 900], dtype=torch.float32)
            if fixed:
                tensors[f"fixed.{name}.{named}"] = getattr(module, f"input_{fixed}").float()
            args = PRESET_SCHEMES[name]["input_activations"]
            tensors[f"{name}.{named}"] = forward_quantize(module, x.clone(), "input", args)
    save_file(tensors, file)


if __name__ == "__main__":
    main(sys.argv[1])
