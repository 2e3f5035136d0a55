"""Record which type llama-quantize gives every tensor: tests/golden/gguf_mixtures.json.

    python scripts/make_golden_mixtures.py path/to/llama-quantize

Tiny float models with the shapes that the rules look at (blocks, heads, tied embeddings, rows that 256 or 32 does not
divide) are quantized by `llama-quantize --dry-run`, with and without an importance matrix, and its log is read.
llama-quantize is built from the sdist of llama-cpp-python 0.3.36: `cmake --build . --target llama-quantize`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.gguf import imatrix
from llmq.gguf.architecture import architecture
from llmq.gguf.mixture import always_float
from llmq.model.experts import unfuse

OUT = Path(__file__).parents[1] / "tests" / "golden" / "gguf_mixtures.json"
MIXTURES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
            "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "F16")  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 128,
          "linear_value_head_dim": 128}  # fmt: skip
ROUTED = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
          "shared_expert_intermediate_size": 256}  # fmt: skip
MODELS = {  # name: model_type, blocks, heads, key-value heads, hidden, intermediate, tied, more of the config
    "llama, 32 blocks, gqa 1": ("llama", 32, 8, 8, 256, 256, False, {}),
    "llama, 32 blocks, gqa 4": ("llama", 32, 8, 2, 256, 512, False, {}),
    "llama, 80 blocks, gqa 8 (70B)": ("llama", 80, 8, 1, 256, 256, False, {}),
    "llama, 30 blocks, tied, rows of 288": ("llama", 30, 9, 3, 288, 512, True, {}),
    "llama, 5 blocks, rows of 48": ("llama", 5, 3, 3, 48, 256, False, {}),
    "qwen2, 24 blocks, tied, rows of 224": ("qwen2", 24, 7, 1, 224, 512, True, {}),
    "qwen2, 80 blocks, gqa 2 (70B)": ("qwen2", 80, 8, 4, 256, 256, False, {}),
    "qwen3, 28 blocks, tied, gqa 2": ("qwen3", 28, 8, 4, 256, 512, True, {}),
    "gemma3, 26 blocks, tied": ("gemma3_text", 26, 4, 1, 256, 512, True, {"query_pre_attn_scalar": 64}),
    "phi3, 32 blocks, q k v in one": ("phi3", 32, 8, 2, 256, 512, False, {}),
    "mixtral, 16 blocks, 8 experts": ("mixtral", 16, 8, 2, 256, 256, False, {}),
    "qwen3moe, 12 blocks, 16 experts": ("qwen3_moe", 12, 8, 2, 256, 256, False, ROUTED | {"norm_topk_prob": True}),
    "qwen3.5 moe, 12 blocks, 16 experts": ("qwen3_5_moe_text", 12, 4, 1, 256, 256, False, LINEAR | ROUTED),
    "qwen3.5, 24 blocks, linear attention": ("qwen3_5_text", 24, 4, 1, 256, 512, True, LINEAR),
}
_LINE = re.compile(r"\]\s+(\S+)\s+- \[.*?type =\s+(\w+), size = .*?(?:\((\w+)\))?\s*$")


def config_of(name: str):
    """Return the transformers config of a model above."""
    kind, blocks, heads, kv, hidden, inner, tied, more = MODELS[name]
    return AutoConfig.for_model(
        kind, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv, hidden_size=hidden,
        head_dim=hidden // heads, intermediate_size=inner, vocab_size=64, tie_word_embeddings=tied, pad_token_id=None,
        **more,
    )  # fmt: skip


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model by ggml's names, `[N, K]`."""
    arch = architecture(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unfuse(model)
    tensors = {n: (ggml, t) for n, t in model.state_dict().items() if (ggml := arch.tensor(n)) is not None}
    several = {n: () if arch.expert(n) is None else (arch.experts,) for n in tensors}
    return {ggml: (*several[n], *arch.shape(n, t.shape)) for n, (ggml, t) in tensors.items()}


def runs(types: dict[str, str]) -> dict[str, str]:
    """Return `leaf: "TYPExCOUNT TYPExCOUNT ..."` over the blocks, matrices only."""
    leaves: dict[str, list[str]] = {}
    for name, kind in sorted(
        types.items(), key=lambda item: [int(p) if p.isdigit() else -1 for p in item[0].split(".")]
    ):
        leaf = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")
        if not always_float(name):
            leaves.setdefault(leaf, []).append(kind)
    return {leaf: " ".join(f"{k}x{len(list(g))}" for k, g in groupby(kinds)) for leaf, kinds in sorted(leaves.items())}


def _write(path: Path, config, shapes: dict[str, tuple[int, ...]]) -> None:
    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch.name)
    arch.describe(writer)
    for name, shape in shapes.items():
        single = len(shape) == 1 or always_float(name)
        writer.add_tensor(name, np.zeros(shape, np.float32 if single else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ask(tool: str, model: Path, mixture: str, extra: list[str]) -> dict[str, str]:
    command = [tool, "--dry-run", *extra, str(model), mixture]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603, the user's own tool
    found = {}
    for line in (done.stdout + done.stderr).splitlines():
        if match := _LINE.search(line):
            found[match[1]] = (match[3] or match[2]).upper()
    return found


def main() -> None:
    """Ask for every model and mixture, with and without importance."""
    (tool,) = sys.argv[1:]
    golden: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            config = config_of(name)
            shapes = shapes_of(config)
            model, importance = Path(folder) / "model.gguf", Path(folder) / "imatrix.gguf"
            _write(model, config, shapes)
            sums = {
                n: [(torch.ones(s[-1]), 1)] * (s[0] if len(s) > 2 else 1)
                for n, s in shapes.items()
                if n.startswith("blk.") and len(s) > 1
            }
            imatrix.write(importance, sums, "none", 1)
            for mixture in MIXTURES:
                for extra, label in (([], mixture), (["--imatrix", str(importance)], f"{mixture} with imatrix")):
                    types = _ask(tool, model, mixture, extra)
                    if set(types) != set(shapes):
                        sys.exit(f"{name}, {label}: the log of {tool} does not read")
                    golden.setdefault(name, {})[label] = runs(types)
    OUT.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{OUT}: {len(golden)} models, {sum(map(len, golden.values()))} lists")


if __name__ == "__main__":
    main()
