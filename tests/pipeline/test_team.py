"""Several processes write the bytes that one writes, whatever is dealt: batches, rows, searches, gradients."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
from _families import FAMILIES

LLAMA = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2}  # gate and up are four pieces
TEXT = {"samples": 22, "seq_len": 32, "dtype": "float32", "device": "cpu", "group_size": 32}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["llmq.api", "_families"])


def seated(rank, size, port):
    """Make this process one of a team of so many, with one thread, and batches of two sequences."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    import torch

    from llmq.pipeline import entering

    torch.set_num_threads(1)
    entering.BATCH_TOKENS = 64  # 11 batches


def quantized(seat, src, out, text, recipes):
    """Run every recipe as one process of a team."""
    import llmq

    seated(*seat)
    for name, options in recipes.items():
        llmq.quantize(src, out / name, calib=text, warn=str, **{**TEXT, **options})


def commanded(seat, src, out, text, broken_at=None):
    """Run the command line as one process of a team, of which the last may fail in some block."""
    from llmq import cli
    from llmq.errors import LlmqError
    from llmq.pipeline import run

    seated(*seat)
    rank, size, _ = seat
    quantize_block = run.quantize_block

    def failing(plan, i, *more):
        if (i, rank) == (broken_at, size - 1):
            raise LlmqError("its memory is full")
        return quantize_block(plan, i, *more)

    run.quantize_block = failing
    os.dup2(os.open(out.with_name(f"stderr-{rank}"), os.O_CREAT | os.O_WRONLY), 2)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TEXT.items()]
    sys.argv = ["llmq", "quantize", str(src), str(out), "--method=gptq", f"--calib={text}", *options]
    cli.main()


def team(size, work, *args):
    """Have a team of so many processes do some work; return how each ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [CONTEXT.Process(target=work, args=((rank, size, port), *args)) for rank in range(size)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    return [p.exitcode for p in processes]


def digests(folder: Path):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def text(tmp_path, prose):
    (tmp_path / "text.txt").write_text(prose(4000))
    return tmp_path / "text.txt"


def same(tmp_path, text, src, recipes):
    """Say that teams of 1, 2 and 4 write the same files."""
    for size in (1, 2, 4):
        assert team(size, quantized, src, tmp_path / str(size), text, recipes) == [0] * size
    for name in recipes:
        one, two, four = (digests(tmp_path / str(size) / name) for size in (1, 2, 4))
        assert one == two == four and len(one) > 3


def test_one_two_and_four_processes_write_the_same_files(tiny_checkpoint, text, tmp_path):
    best = {"method": "fisher,migrate,qep,gptq,descent,signround", "kv_bits": 8, "format": "compressed-tensors"}
    same(tmp_path, text, tiny_checkpoint(**LLAMA), {"awq": {"method": "awq,rtn", "format": "awq"}, "best": best})


def test_experts_are_solved_by_all(text, tmp_path):
    FAMILIES["mixtral"].save(tmp_path / "src")
    same(tmp_path, text, tmp_path / "src", {"balanced": {"quality": "balanced", "format": "gptq"}})


def test_an_error_ends_all_is_told_once_and_any_number_of_processes_goes_on(tiny_checkpoint, text, tmp_path):
    src, whole, out = tiny_checkpoint(**LLAMA), tmp_path / "1/out", tmp_path / "2/out"
    whole.parent.mkdir()
    out.parent.mkdir()
    assert team(2, commanded, src, out, text, 1) == [1, 1]
    told = "".join((out.parent / f"stderr-{rank}").read_text() for rank in range(2))
    assert told.count("error:") == 1 and "its memory is full" in told
    assert team(3, commanded, src, out, text) == [0, 0, 0]
    assert "going on from block 1 of 2" in (out.parent / "stderr-0").read_text()
    assert team(1, commanded, src, whole, text) == [0]
    assert digests(out) == digests(whole)
