"""What each method and each step costs and gains on one model: size, perplexity, KL, seconds, peak memory.

    python scripts/bench_accuracy.py MODEL --calib FILE --text FILE [--out DIR] [--only NAME ...] [--seeds 0 1 2]
    python scripts/bench_accuracy.py MODEL --calib FILE --text FOLDER [--home FILE] [--against NAME] ...

Each row is one `llmq quantize` and one `llmq eval` in processes of their own, both models scored in float32, on a text
that must not be the one calibrated on. Rows are kept in DIR/accuracy.json as they come, so that a stopped run goes on
where it was; with a folder of texts (make_texts.py), which scores each row on every kind, in DIR/kinds.json
(_scored.py). --calib may be given several times, as to `llmq quantize`.
The ladder adds one step at a time to rounding to nearest, and takes each one alone away from the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import _measure as measure
import torch
from _llama_tools import CONTEXT, LlamaTools
from _rows import Row
from _scored import Scores, add_options

from llmq.gguf.mixture import FLOATS as FLOATS_OF_GGML
from llmq.gguf.reader import GgufFile

W8A8 = ("--bits", 8, "--act-bits", 8, "--group-size", "channel", "--format", "compressed-tensors")
MSE = ("--range", "mse")
LADDER: dict[str, tuple[object, ...]] = {
    "rtn": ("--method", "rtn"),
    "rtn mse": ("--method", "rtn", *MSE),
    "gptq": ("--method", "gptq"),
    "gptq mse without shifts": ("--method", "gptq", "--range", "mse:shift=false"),
    "gptq mse": ("--method", "gptq", *MSE),
    "gptq,descent mse": ("--method", "gptq,descent", *MSE),
    "qep,gptq mse": ("--method", "qep,gptq", *MSE),
    "qep,gptq,descent": ("--method", "qep,gptq,descent"),
    "qep,rtn,descent mse": ("--method", "qep,rtn,descent", *MSE),
    "qep,gptq,descent mse": ("--method", "qep,gptq,descent", *MSE),
    "qep,gptq,descent mse, alpha .5": ("--method", "qep:alpha=0.5,gptq,descent", *MSE),
    "qep,gptq,descent:scales=false mse": ("--method", "qep,gptq,descent:scales=false", *MSE),
    "awq,qep,gptq,descent mse": ("--method", "awq,qep,gptq,descent", *MSE),
    "rotate,qep,gptq,descent mse": ("--method", "rotate,qep,gptq,descent", *MSE),
    "fisher,qep,gptq,descent mse": ("--method", "fisher,qep,gptq,descent", *MSE),
    "residual rotation,qep,gptq,descent mse": (
        "--method",
        "rotate:residual=true:untie=true,qep,gptq,descent",
        *MSE,
    ),
    "qep,gptq,descent,distill mse": ("--method", "qep,gptq,descent,distill", *MSE),
    "fisher,qep,gptq,descent,distill mse": ("--method", "fisher,qep,gptq,descent,distill", *MSE),
    "qep,gptq,descent,signround mse": ("--method", "qep,gptq,descent,signround", *MSE),
    "rtn,signround mse": ("--method", "rtn,signround", *MSE),
}
PRESETS = {f"quality {q}": ("--quality", q) for q in ("fast", "balanced", "best")}
OTHERS: dict[str, tuple[object, ...]] = {
    "gptq desc_act": ("--method", "gptq:desc_act=true"),
    "gptq asym": ("--method", "gptq", "--asym"),
    "gptq asym mse": ("--method", "gptq", "--asym", *MSE),
    "quality balanced asym": ("--quality", "balanced", "--asym"),
    "quality balanced varied 0": ("--quality", "balanced", "--varied", 0),
    "quality balanced embeddings 8": ("--quality", "balanced", "--format", "compressed-tensors", "--embeddings", 8),
    "awq": ("--method", "awq,rtn", "--format", "awq"),
    "awq+gptq": ("--method", "awq,gptq", "--format", "awq"),
    "gptq calib self": ("--method", "gptq", "--calib", "self"),
}
BUDGETS: dict[str, tuple[object, ...]] = {
    "target-bpw 3.75": ("--target-bpw", 3.75),
    "target-bpw 4.25": ("--target-bpw", 4.25),
    "target-bpw 4.5": ("--target-bpw", 4.5),
    "target-bpw 4.5 of 4,8": ("--target-bpw", 4.5, "--bit-choices", "4,8"),
}
EIGHT: dict[str, tuple[object, ...]] = {
    "w8a8 rtn": ("--method", "rtn"),
    "w8a8 smoothquant": ("--method", "smoothquant,rtn"),
    "w8a8 smoothquant .8 norms": ("--method", "smoothquant:alpha=0.8:linears=false,rtn"),
    "w8a8 smoothquant+gptq": ("--method", "smoothquant,gptq"),
    "w8a8 migrate": ("--method", "migrate:feedback=1,rtn"),
    "w8a8 quality fast": ("--quality", "fast"),
    "w8a8 quality balanced": ("--quality", "balanced"),
    "w8a8 quality balanced act-asym": ("--quality", "balanced", "--act-asym"),
    "w8a8 static": ("--method", "smoothquant,rtn", "--act", "tensor"),
    "w8a8 migrate static": ("--method", "migrate:feedback=1,rtn", "--act", "tensor"),
}
FLOATS: dict[str, tuple[object, ...]] = {
    "nvfp4a16": ("--weights", "nvfp4"),
    "mxfp4a16": ("--weights", "mxfp4"),
    "nvfp4": ("--weights", "nvfp4", "--inputs", "nvfp4"),
    "mixed": ("--scheme", "mixed"),
    "fp8 static": ("--weights", "fp8", "--inputs", "fp8:group=tensor"),
    "fp8 dynamic": ("--weights", "fp8", "--inputs", "fp8"),
}
GGUF: dict[str, tuple[object, ...]] = {
    "gguf Q4_K_M": ("--type", "Q4_K_M"),
    "gguf Q3_K_M": ("--type", "Q3_K_M"),
    "gguf target-bpw 5.53": ("--type", "Q4_K_M", "--target-bpw", 5.534),  # the bits of SmolLM2's blocks as Q4_K_M
    "gguf target-bpw 5.43": ("--type", "Q4_K_M", "--target-bpw", 5.434),  # those of Gemma 3 270M's
    "gguf target-bpw 5.53 with IQ4_NL": (
        "--type", "Q4_K_M", "--target-bpw", 5.534, "--choices", "Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K,Q8_0"
    ),
}  # fmt: skip
LLAMA = {f"llama.cpp {kind} imatrix": ("--type", kind) for kind in ("Q4_K_M", "Q3_K_M", "Q2_K")}
ROWS = {
    **LLAMA,
    **{f"{bits}-bit {n}": (*o, "--bits", bits, "--group-size", 64) for bits in (4, 3, 2) for n, o in LADDER.items()},
    **{f"{bits}-bit {n}": (*o, "--bits", bits, "--group-size", 64) for bits in (4, 3, 2) for n, o in PRESETS.items()},
    **{f"4-bit {n}": (*o, "--bits", 4, "--group-size", 64) for n, o in OTHERS.items()},
    **{f"{n} quality balanced": ("--quality", "balanced", *o, "--group-size", 64) for n, o in BUDGETS.items()},
    "4-bit quality balanced group 32": ("--quality", "balanced", "--bits", 4, "--group-size", 32),
    **{n: (*o, *W8A8) for n, o in EIGHT.items()},
    **{f"{n} {m}": ("--method", m, *o) for n, o in FLOATS.items() for m in ("rtn", "gptq")},
    **{f"{n} {q}": (*by, *o) for n, o in FLOATS.items() for q, by in PRESETS.items()},
    **{f"{n} {q}": (*by, *o, "--format", "gguf") for n, o in GGUF.items() for q, by in PRESETS.items()},
}


def measure_row(name: str, args: argparse.Namespace, scores: Scores) -> Row:
    """Quantize, score, and drop the checkpoint."""
    row, _, seed = name.partition(", seed ")
    if row in LLAMA:
        return llama_row(name, args, scores)
    gguf = "gguf" in ROWS[row]
    out = args.out / f"checkpoint-{os.getpid()}{'.gguf' if gguf else ''}"  # several may run at a time
    common = ("--samples", args.samples, "--seq-len", args.seq_len, "--seed", seed or 0, "--dtype", args.dtype)
    texts = [word for source in args.calib for word in ("--calib", source)]
    options = ROWS[row] if "--calib" in ROWS[row] else (*ROWS[row], *texts)
    taken = measure.llmq("quantize", args.model, out, *options, *common, "--overwrite")
    record = GgufFile(out).report() if gguf else json.loads((out / "quantization.json").read_text())
    scored = measure.decoded(out) if gguf else out
    figures = scores.of(name, scored)
    shutil.rmtree(scored)
    if gguf:
        out.unlink()
    return {
        "command": " ".join(str(o) for o in (*ROWS[row], *common)),
        "bits_per_weight": record["size"]["bits_per_weight"],
        "bytes": record["size"]["bytes"],
        "dtype": record["dtype"],
        "seconds": taken.seconds,
        "cpu_seconds": taken.cpu_seconds,
        "peak_bytes": taken.peak_bytes,
        "threads": torch.get_num_threads(),
        "versions": {"llmq": record["llmq"], "torch": record["torch"]},
        **figures,
    }


def llama_row(name: str, args: argparse.Namespace, scores: Scores) -> Row:
    """Quantize with llama.cpp's tools, the matrix from the first --calib; score what llmq decodes, drop the file."""
    kind, out = LLAMA[name][1], args.out / f"llama-{os.getpid()}.gguf"
    tools = LlamaTools(args.llama, args.model, Path(args.calib[0]), args.out)
    taken = tools.quantize(kind, out, "--imatrix", tools.imatrix())
    decoded, file = measure.decoded(out), GgufFile(out)
    quantized = [t for t in file.tensors.values() if t.tensor_type.name not in FLOATS_OF_GGML]
    figures = scores.of(name, decoded)
    shutil.rmtree(decoded)
    out.unlink()
    return {
        "command": f"llama-quantize --imatrix ({tools.chunks} x {CONTEXT} tokens) {kind}",
        "bits_per_weight": 8 * sum(t.n_bytes for t in quantized) / sum(t.n_elements for t in quantized),
        "bytes": file.data_bytes(),
        "seconds": taken.seconds,
        "cpu_seconds": taken.cpu_seconds,
        "peak_bytes": taken.peak_bytes,
        **figures,
    }


def main() -> None:
    """Measure the rows that are not there yet, and print them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True, action="append", help="again for more: SOURCE:weight=2")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=[n for n in ROWS if n not in LLAMA], metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="of activations")
    parser.add_argument("--llama", type=Path, help="folder of llama-quantize and llama-imatrix, for rows of llama.cpp")
    add_options(parser)
    args = parser.parse_args()
    if args.llama is None and not LLAMA.keys().isdisjoint(args.only):
        parser.error("rows of llama.cpp want --llama, or name others with --only")
    wanted = [name if seed == 0 else f"{name}, seed {seed}" for seed in args.seeds for name in args.only]
    with tempfile.TemporaryDirectory() as room:
        scores = Scores(args, "accuracy", Path(room))
        if args.markdown:
            return scores.markdown(scores.rows.read())
        failed = scores.rows.fill(wanted, lambda name: measure_row(name, args, scores), scores.show)
    scores.show(scores.rows.read())
    print(f"float: {scores.floats()}; {measure.machine()}")
    sys.exit(f"{failed} rows failed" if failed else 0)


if __name__ == "__main__":
    main()
