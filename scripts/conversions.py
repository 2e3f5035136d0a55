"""Print what `llmq export` makes of every kind of checkpoint in every target: kept, rounded (of what), or refused.

    python scripts/conversions.py              a table as docs/export.md has it, in Markdown, with the reasons below
    python scripts/conversions.py mlx awq      these targets alone

Every pair is run, on the peers' tiny checkpoints in tests/golden and on what is made of them; each file is verified.
"""

import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import llmq
from llmq.errors import LlmqError

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TARGETS = ("gptq", "awq", "compressed-tensors", "modelopt", "mlx", "gguf", "onnx", "float")
PEERS = {
    "GPTQ, 4 bits": "gptq_v1_w4g32_sym",
    "GPTQ, 4 bits, asymmetric (v1)": "gptq_v1_w4g32_asym",
    "GPTQ, 4 bits, asymmetric (v2)": "gptq_v2_w4g32_asym",
    "GPTQ, 4 bits, act-order": "gptq_v1_w4g32_desc_act",
    "GPTQ, 4 bits, per channel": "gptq_v1_w4_perchannel",
    "GPTQ, 2 bits": "gptq_v1_w2g32",
    "GPTQ, 3 bits": "gptq_v1_w3g32",
    "GPTQ, 8 bits": "gptq_v1_w8g32_sym",
    "AWQ": "awq_w4g32",
    "AWQ, scales in bfloat16": "awq_gptqmodel_w4g32",
    "auto-round, 4 bits": "auto_round_w4g32_sym",
    "compressed-tensors, 4 bits": "ct_pack_w4g32_sym",
    "compressed-tensors, 4 bits, asymmetric": "ct_pack_w4g32_asym",
    "compressed-tensors, 8 bits per channel": "ct_pack_w8_channel_sym",
    "compressed-tensors, 4 and 8 bits": "ct_mixed",
    "compressed-tensors, W8A8 static": "ct_int_w8a8_static",
    "compressed-tensors, FP8 dynamic": "ct_fp8_dynamic",
    "compressed-tensors, FP8 static": "ct_fp8_static",
    "compressed-tensors, FP8 blocks": "ct_fp8_block",
    "compressed-tensors, NVFP4": "ct_nvfp4",
    "compressed-tensors, MXFP4": "ct_mxfp4",
    "compressed-tensors, MXFP8": "ct_mxfp8a16",
}
MADE = {
    "ModelOpt, FP8": ("ct_fp8_static", "modelopt"),
    "ModelOpt, NVFP4": ("ct_nvfp4", "modelopt"),
    "MLX, 4 bits": ("gptq_v1_w4g32_sym", "mlx"),
    "MLX, 4 bits, asymmetric": ("ct_pack_w4g32_asym", "mlx"),
    "MLX, MXFP4": ("ct_mxfp4", "mlx"),
}
SHORT = {
    "values exact": "kept",
    "codes exact, minimum rounded": "minimum rounded",
    "codes exact, factor rounded": "factor rounded",
    "codes exact, scales rounded": "scales rounded",
}


def sources(room: Path) -> Iterator[tuple[str, Path]]:
    """Yield every kind of checkpoint, with a tokenizer, which GGUF wants."""
    for kind, name in PEERS.items():
        yield kind, with_tokenizer(GOLDEN / name, room)
    for kind, (name, to) in MADE.items():
        made = room / f"{name}-{to}"
        llmq.convert(with_tokenizer(GOLDEN / name, room), made, to)
        yield kind, made


def with_tokenizer(folder: Path, room: Path) -> Path:
    """Return a copy of a checkpoint with the tokenizer of the float model."""
    copy = room / folder.name
    if not copy.exists():
        shutil.copytree(folder, copy)
        for file in (GOLDEN / "float").glob("tokenizer*"):
            shutil.copy(file, copy)
    return copy


def outcome(folder: Path, target: str, room: Path) -> str:
    """Return what became of the linears; of a refusal its reason."""
    out = room / f"{folder.name}-{target}-out{'.gguf' if target == 'gguf' else ''}"
    try:
        done = llmq.convert(folder, out, "gguf:pre=gpt-2" if target == "gguf" else target)
    except LlmqError as e:
        return f"refused: {e}"
    finally:
        (shutil.rmtree if out.is_dir() else Path.unlink)(out) if out.exists() else None
    if "outcomes" not in done:
        return "decoded"
    found = [SHORT.get(o, o) for o in done["outcomes"]]
    return " and ".join(sorted(found, key=lambda o: o != "kept"))


def main(targets: tuple[str, ...]) -> None:
    """Print the table and the reasons."""
    reasons: dict[str, int] = {}
    print(f"| | {' | '.join(targets)} |\n|{'---|' * (len(targets) + 1)}")
    with tempfile.TemporaryDirectory() as room:
        for kind, folder in sources(Path(room)):
            cells = []
            for target in targets:
                found = outcome(folder, target, Path(room))
                if found.startswith("refused"):
                    why = found.removeprefix("refused: ").replace(room, "").split("; ")[0]
                    why = re.sub(r" \(it has .*\)", "", why)
                    why = why.partition(": its codes cannot be kept: ")[2] or why.partition(": ")[2] or why
                    found = f"refused ({reasons.setdefault(why, len(reasons) + 1)})"
                cells.append(found)
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    print("".join(f"\n{n}. {why}" for why, n in reasons.items()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(tuple(sys.argv[1:]) or TARGETS)
