"""Runs that are ended at a moment: `llmq` in a forked child, what a folder then holds, a tiny model to run on.

Imported before torch (and so named before what imports it): it and what it starts compute with one thread.
Not here: which moments there are, and what must hold (check_faults.py, check_resume.py, check_team.py).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ALONE = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
         "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
os.environ |= ALONE

Files = dict[str, str]
"""What a folder holds: the digest of each file by its path."""


def held(folder: Path) -> Files:
    """Return what a folder holds."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


def save_llama(folder: Path, dtype: str = "float32", **sizes: int) -> None:
    """Write a random Llama with 2 key-value heads, and its tokenizer."""
    import torch
    from _tiny import VOCAB, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)


def forked(
    room: Path, cwd: Path, arguments: list[str], begin: Callable[[], None], end: Callable[[], int]
) -> tuple[int, str, int]:
    """Run the command line in a child. Returns its exit status, what it printed as errors, and how much it counted.

    room: a folder for notes. begin: called in the child before the run. end: ends the counting; returns the count.
    """
    from llmq import cli

    said, count = room / "stderr", room / "count"
    count.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(cwd)
            sys.argv = ["llmq", *arguments]
            begin()
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        finally:
            count.write_text(str(end()))
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(), int(count.read_text()) if count.exists() else 0


def parser(doc: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """Return what such a script takes: --only of the names, --seed, --json."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", metavar="NAME", choices=[*names], default=[*names])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", action="store_true", help="print what came of every trial")
    return made
