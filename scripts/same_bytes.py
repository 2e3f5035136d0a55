"""Run the recipes of same_bytes.yaml with two commits and compare every file that they write, byte by byte.

    python scripts/same_bytes.py OLD NEW [--only NAME ...]          NEW may be `.`, the working tree

Each commit is unpacked into a temporary folder, and its command line run there on tiny random models, with one thread
and the same paths: about four minutes. A line a recipe says `equal`, or which files differ and where: the tensors of a
weight file, the keys of a JSON or GGUF file. Exit status 1 where any differs or a command fails.

No digests are kept: floats, and the codes made from them, differ from one kind of processor to another.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false"}

import gguf
import numba  # noqa: F401, read once here, not by every child
import torch
import yaml
from _tiny import VOCAB, make_prose, make_tokenizer
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, str | list[str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
TEXT = "--calib text.txt --samples 8 --seq-len 64 --seed 3"
SHOWN = 6  # names of what differs in a file

SHAPE = {
    "vocab_size": VOCAB + 64,  # Qwen's tokenizer adds some of its own
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 16}
WIDE = GROUPED | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # ggml's superblocks are 256 columns
MODELS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any], torch.dtype]] = {
    "llama": (LlamaConfig, GROUPED | {"tie_word_embeddings": False}, torch.bfloat16),
    "llama-f16": (LlamaConfig, GROUPED | {"tie_word_embeddings": False}, torch.float16),
    "llama-tied": (LlamaConfig, GROUPED | {"tie_word_embeddings": True}, torch.float32),
    "llama-wide": (LlamaConfig, WIDE | {"tie_word_embeddings": False, "num_hidden_layers": 3}, torch.bfloat16),
    "mistral": (MistralConfig, GROUPED | {"tie_word_embeddings": False}, torch.bfloat16),
    "qwen2": (Qwen2Config, GROUPED | {"tie_word_embeddings": True}, torch.bfloat16),
    "qwen2-wide": (Qwen2Config, WIDE | {"tie_word_embeddings": True}, torch.bfloat16),
    "qwen3": (Qwen3Config, GROUPED | {"tie_word_embeddings": False}, torch.float32),
    "neox": (GPTNeoXConfig, SHAPE, torch.float32),
}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def make_inputs(work: Path) -> None:
    """Write the models, an adapter of `llama` and the calibration text."""
    disable_progress_bar()
    (work / "text.txt").write_text(make_prose(6000))
    tokenizer = make_tokenizer(bos=True)
    for seed, (name, (config, sizes, dtype)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(**sizes)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases, which are all ones and zeros in a new model
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    (work / "lora").mkdir()
    (work / "lora/adapter_config.json").write_text(json.dumps(LORA))
    save_file(dict(_lora()), work / "lora/adapter_model.safetensors")


def _lora() -> Iterator[tuple[str, torch.Tensor]]:
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}
    for i in range(2):
        for module, (N, K) in shapes.items():
            where = f"base_model.model.model.layers.{i}.{module}"
            yield f"{where}.lora_A.weight", 0.1 * torch.randn(LORA["r"], K)
            yield f"{where}.lora_B.weight", 0.1 * torch.randn(N, LORA["r"])


def unpack(commit: str, folder: Path) -> None:
    """Put the package of a commit, or of the working tree, into a folder."""
    if commit == ".":
        for package in ("llmq", "kernels/llmq_kernels"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        return
    git = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "llmq", "kernels/llmq_kernels"]
    done = subprocess.run(git, capture_output=True, check=False)  # noqa: S603 (fixed arguments and a commit)
    if done.returncode:
        sys.exit(done.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")


def in_child(function: Callable[[], None]) -> int:
    """Call a function in a forked child, which has read the large libraries already; return its exit status."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    return child.exitcode or 0


def command_line(code: Path, work: Path, words: list[str]) -> None:
    """Be `python -m llmq WORDS` of a commit, in the folder of the models, and print into `log` there."""
    os.chdir(work)
    sys.path[:0] = [str(code), str(code / "kernels")]
    sys.argv = ["llmq", *words]
    with Path("log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        runpy.run_module("llmq", run_name="__main__", alter_sys=True)


def run(code: Path, work: Path, name: str, keep: Path) -> str:
    """Run a recipe and move what it wrote to `keep`; return what went wrong, nothing where all went well."""
    out = work / "out" / name
    out.mkdir(parents=True)
    (work / "log").write_text("")
    said = ""
    for line in [RECIPES[name]] if isinstance(RECIPES[name], str) else RECIPES[name]:
        words = [w.replace("OUT", f"out/{name}") for w in line.replace("TEXT", TEXT).split()]
        if status := in_child(partial(command_line, code, work, words)):
            said = f"status {status} of llmq {shlex.join(words)}\n{indent((work / 'log').read_text(), ' ' * 8)}"
            break
    out.rename(keep / name)
    return said


def differences(old: Path, new: Path) -> Iterator[str]:
    """Yield a line for every file that is not in both folders, or not the same."""
    files = {p.relative_to(root) for root in (old, new) for p in root.rglob("*") if p.is_file()}
    for file in sorted(files):
        a, b = old / file, new / file
        if not (a.exists() and b.exists()):
            yield f"{file}: only {'OLD' if a.exists() else 'NEW'} writes it"
        elif a.read_bytes() != b.read_bytes():
            yield f"{file}: {_where(a, b)}"


def _where(a: Path, b: Path) -> str:
    """Return the names of what differs between two files."""
    reader = {".safetensors": _tensors, ".json": _json, ".gguf": _gguf}.get(a.suffix)
    if reader is None:
        return "differs"
    one, two = reader(a), reader(b)
    names = [n for n in one | two if one.get(n) != two.get(n)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "the same entries, written otherwise"


def _tensors(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found = {"__metadata__": header.pop("__metadata__", None)}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], data[start + first : start + last])
    return found


def _json(file: Path) -> dict[str, Any]:
    return dict(_flat("", json.loads(file.read_text())))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield path or "the whole", value
        return
    for key, inner in value.items():
        yield from _flat(f"{path}/{key}", inner)


def _gguf(file: Path) -> dict[str, Any]:
    read = gguf.GGUFReader(file)
    found: dict[str, Any] = {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in read.tensors}
    found |= {name: [bytes(p) for p in f.parts] for name, f in read.fields.items()}
    if "llmq.report" in found:
        found |= _flat("llmq.report", json.loads(read.fields["llmq.report"].contents()))
    return found


def compare(old: str, new: str, names: list[str], folder: Path) -> bool:
    """Run the recipes with both commits, print a line for each, and say whether all are equal."""
    work = folder / "work"
    for commit, side in ((old, "old"), (new, "new")):
        unpack(commit, folder / f"{side}-code")
        (folder / side).mkdir()
    work.mkdir()
    if in_child(partial(make_inputs, work)):
        sys.exit("the models cannot be made")
    equal = True
    for name in names:
        failed = [run(folder / f"{side}-code", work, name, folder / side) for side in ("old", "new")]
        lines = [f"{side} {said}" for side, said in zip(("OLD", "NEW"), failed, strict=True) if said]
        lines += differences(folder / "old" / name, folder / "new" / name)
        equal &= not lines
        print(f"{name:24} {'equal' if not lines else ''}", *lines, sep="\n    " if lines else "", flush=True)
    return equal


def main() -> None:
    """Compare, and end with status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="a commit, or . for the working tree")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not compare(args.old, args.new, args.only, Path(folder)))


if __name__ == "__main__":
    main()
