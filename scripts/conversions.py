"""Print what `llmq export` makes of every kind of checkpoint in every target: kept, rounded (of what), or refused.

    python scripts/conversions.py              a table as docs/export.md has it, in Markdown, with the reasons below
    python scripts/conversions.py mlx awq      these targets alone

Every pair is run, on the peers' tiny checkpoints in tests/golden, on what is made of them, and on GGUF files of a tiny
random model, all matrices of whose blocks are of one type (embedding and head become floats where a target has no
place for them packed); each file is verified.
"""

import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from _tiny import VOCAB, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

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
GGUF = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_0", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
)  # fmt: skip
SHORT = {
    "decoded": "",
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
    floats = tiny(room / "tiny")
    for kind in GGUF:
        made = room / f"{kind}.gguf"
        llmq.quantize(floats, made, type=kind, override=[f"blk:type={kind}"], method="rtn")
        yield f"GGUF, {kind}", made


def tiny(folder: Path) -> Path:
    """Write a random model whose rows fill ggml's superblocks, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(bos=False).save_pretrained(folder)
    return folder


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
    if folder.suffix == out.suffix == ".gguf":
        return "itself"
    ends = {"embeddings": "float"} if folder.suffix == ".gguf" and target not in ("gguf", "onnx", "float") else {}
    try:
        done = llmq.convert(folder, out, "gguf:pre=gpt-2" if target == "gguf" else target, **ends)
    except LlmqError as e:
        return f"refused: {e}"
    finally:
        (shutil.rmtree if out.is_dir() else Path.unlink)(out) if out.exists() else None
    if "outcomes" not in done:
        return "decoded"
    found = {said for o in done["outcomes"] if (said := SHORT.get(o.partition(", decoded")[0], o))}
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
