"""What openvino and openvino-genai make of llmq's exports: logits beside llmq's reference, and a sentence of each.

    python scripts/interop_openvino.py make QUANTIZED WORK       in llmq's Python: exports, and llmq's logits
    python scripts/interop_openvino.py check WORK                in OpenVINO's Python; status 0 only if all is right

WORK/plain is the plain ONNX folder, WORK/stateful the model that scripts/_openvino.py makes of it, WORK/model.gguf the
GGUF file. `check` computes in float32 without rounding inputs and asks for 60 dB of the ONNX graph and of its stateful
form; the GGUF pipeline, whose graph nobody else sees, is to say the sentence that the stateful one says.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "The capital of France is"
LEAST = 60.0  # dB
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": 1}


def make(quantized: Path, work: Path) -> None:
    """Write the exports, and the logits of llmq's reference decode for a prompt."""
    import torch

    import llmq

    work.mkdir(parents=True, exist_ok=True)
    for out, to in ((work / "plain", "onnx:qdq"), (work / "model.gguf", "gguf")):
        command = [sys.executable, "-m", "llmq", "export", str(quantized), str(out), "--to", to, "--overwrite"]
        subprocess.run(command, check=True)  # noqa: S603, llmq itself
    ids = llmq.load_tokenizer(quantized)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = llmq.load(quantized, dtype=torch.float32, backend="reference")(ids).logits
    np.savez(work / "reference.npz", ids=ids.numpy(), logits=logits.numpy())


def check(work: Path) -> bool:
    """Run all three; print a line for each."""
    import openvino

    stateful = work / "stateful"
    command = [sys.executable, str(Path(__file__).with_name("_openvino.py")), str(work / "plain"), str(stateful)]
    subprocess.run(command, check=True)  # noqa: S603, of this folder
    with np.load(work / "reference.npz") as stored:
        ids, want = stored["ids"], stored["logits"]
    fine = True
    for name, file in (("plain", work / "plain/model.onnx"), ("stateful", stateful / "openvino_model.xml")):
        found = _logits(openvino.Core().compile_model(file, "CPU", EXACT), ids)
        error, signal = np.square(found.astype(np.float64) - want).sum(), np.square(want.astype(np.float64)).sum()
        decibels = 10 * np.log10(signal / error)
        fine &= bool(decibels > LEAST)
        print(f"{'PASS' if decibels > LEAST else 'FAIL'} {name}: {decibels:.1f} dB")
    said = {name: _said(path) for name, path in (("stateful", stateful), ("GGUF", work / "model.gguf"))}
    same = len(set(said.values())) == 1 and all(said.values())
    print(f"{'PASS' if same else 'FAIL'} openvino-genai says {said}")
    return fine and same


def _logits(compiled: Any, ids: Any) -> Any:
    """Return the logits of a prompt; a graph that is handed its cache begins with an empty one."""
    n = ids.shape[1]
    known = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(n)[None],
        "beam_idx": np.zeros(1, np.int32),
    }  # fmt: skip
    feeds = {}
    for i in compiled.inputs:
        shape = i.get_partial_shape()
        empty = [shape[1].get_length(), 0, shape[3].get_length()] if len(shape) == 4 else []
        feeds[i.get_any_name()] = known.get(i.get_any_name(), np.zeros([1, *empty], np.float32))
    return compiled.create_infer_request().infer(feeds)[compiled.output("logits")]


def _said(path: Path) -> str:
    import openvino_genai

    own = {} if path.suffix == ".gguf" else {"ATTENTION_BACKEND": "SDPA"}
    pipeline = openvino_genai.LLMPipeline(str(path), "CPU", **own)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.apply_chat_template = 16, False, False
    return str(pipeline.generate(PROMPT, config))


def main() -> None:
    """Make or check."""
    what, *paths = sys.argv[1:]
    if what == "make":
        make(*(Path(p) for p in paths))
    else:
        sys.exit(not check(Path(paths[0])))


if __name__ == "__main__":
    main()
