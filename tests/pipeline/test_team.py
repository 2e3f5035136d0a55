"""Several processes write the bytes that one writes, whatever is dealt: batches, rows, searches, gradients."""

import hashlib
import multiprocessing
import os
import socket

import pytest

LLAMA = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2}
TEXT = {"samples": 22, "seq_len": 32, "dtype": "float32", "device": "cpu", "group_size": 32}
RECIPES = {
    "gptq": {"method": "gptq"},
    "balanced": {"quality": "balanced"},
    "awq": {"method": "awq,rtn", "format": "awq"},
    "w8a8": {"method": "smoothquant,gptq", "bits": 8, "act_bits": 8, "act": "tensor", "group_size": "channel"},
    "best": {"method": "fisher,migrate,qep,gptq,descent,signround", "kv_bits": 8, "format": "compressed-tensors"},
}


def work(rank, size, port, src, out, text, recipes):
    """Be one process of a team, and run every recipe with it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    import torch

    import llmq
    from llmq.pipeline import run

    torch.set_num_threads(1)
    run.BATCH_TOKENS = 64  # 11 batches
    for name, options in recipes.items():
        llmq.quantize(src, out / name, calib=text, warn=lambda _: None, **(TEXT | options))


def team(size, *args):
    """Run a team of so many processes to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmq.api"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, size, port, *args)) for rank in range(size)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * size


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def written(tiny_llama, tokenizer_bos, prose_text, tmp_path_factory):
    """What teams of 1, 2 and 4 processes write for every recipe."""


def test_one_two_and_four_processes_write_the_same_bytes(tiny_checkpoint, prose, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(prose(4000))
    src = tiny_checkpoint(**LLAMA)
    for size in (1, 2, 4):
        team(size, src, tmp_path / str(size), text, RECIPES)
    for name in RECIPES:
        one, *others = (digests(tmp_path / str(size) / name) for size in (1, 2, 4))
        assert "model.safetensors" in one
        for other in others:
            assert one == other, name
