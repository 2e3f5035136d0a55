"""Several processes write the bytes that one writes, whatever is dealt: batches, rows, searches, gradients."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from _families import FAMILIES
from _tiny import make_prose

LLAMA = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2}  # gate and up are four pieces
TEXT = {"samples": 22, "seq_len": 32, "dtype": "float32", "device": "cpu", "group_size": "32"}
RECIPES = {  # the model, and what is done to it
    "awq": ("llama", {"method": "awq,rtn", "format": "awq"}),
    "best": ("llama", {"method": "fisher,migrate,qep,gptq,descent,signround:steps=4:check=2", "kv_bits": 8,
                       "format": "compressed-tensors"}),
    "gptq": ("llama", {"method": "gptq"}),
    "experts": ("mixtral", {"quality": "balanced", "format": "gptq"}),
    "floats": ("llama", {"weights": "nvfp4", "inputs": "nvfp4", "quality": "balanced", "group_size": None}),
    "mixture.gguf": ("llama", {"type": "Q4_K_M", "format": "gguf", "quality": "balanced", "group_size": None}),
    "smoothquant": ("llama", {"method": "smoothquant,rtn", "bits": 8, "act_bits": 8, "group_size": "channel",
                              "format": "compressed-tensors"}),
}  # fmt: skip
SIZES = (1, 2, 4)
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


def quantized(seat, root, out, recipes):
    """Run every recipe as one process of a team."""
    import llmq

    seated(*seat)
    for name, (model, options) in recipes.items():
        llmq.quantize(root / model, out / name, calib=root / "text.txt", warn=str, **{**TEXT, **options})


def commanded(seat, root, out, broken_at=None, killed=False):
    """Run the command line as one process of a team, of which the last may fail in some block, or be killed."""
    from llmq import cli
    from llmq.errors import LlmqError
    from llmq.pipeline import run

    seated(*seat)
    rank, size, _ = seat
    quantize_block = run.quantize_block

    def failing(plan, i, *more):
        if (i, rank) == (broken_at, size - 1):
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise LlmqError("its memory is full")
        return quantize_block(plan, i, *more)

    run.quantize_block = failing
    os.dup2(os.open(out.with_name(f"stderr-{rank}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TEXT.items()]
    sys.argv = ["llmq", "quantize", f"{root}/llama", str(out), "--method=gptq", f"--calib={root}/text.txt", *options]
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


def digests(out: Path):
    files = [out] if out.is_file() else [f for f in sorted(out.rglob("*")) if f.is_file()]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama, tokenizer_bos):
    """A folder with models, a text, and what teams of 1, 2 and 4 write of every recipe."""
    root = tmp_path_factory.mktemp("team")
    tiny_llama(**LLAMA).save_pretrained(root / "llama")
    tokenizer_bos.save_pretrained(root / "llama")
    FAMILIES["mixtral"].save(root / "mixtral")
    (root / "text.txt").write_text(make_prose(4000))
    for size in SIZES:
        assert team(size, quantized, root, root / str(size), RECIPES) == [0] * size
    return root


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_two_and_four_processes_write_the_same_files(made, recipe):
    one, *more = (digests(made / str(size) / recipe) for size in SIZES)
    assert all(files == one for files in more)
    assert recipe in one or len(one) > 3  # a file, or a folder of several


def test_an_error_or_a_kill_ends_all_is_told_once_and_any_number_of_processes_goes_on(made, tmp_path):
    out = tmp_path / "gptq"
    for killed, said in ((True, "another process of this run has ended"), (False, "its memory is full")):
        assert team(2, commanded, made, out, 1, killed) == [1, -signal.SIGKILL if killed else 1]
        told = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(2))
        assert told.count("error:") == 1 and said in told
    assert team(3, commanded, made, out) == [0, 0, 0]
    assert "going on from block 1 of 2" in (tmp_path / "stderr-0").read_text()
    assert digests(out) == digests(made / "1/gptq")
