"""A run that was killed goes on when the same command is given again, and ends in the bytes of one that was not."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _tiny import make_prose

import llmq
from llmq import calibration
from llmq.pipeline import block, run, weights
from llmq.types import LlmqError

OPTIONS = {"method": "gptq", "bits": 4, "group_size": 32, "samples": 4, "seq_len": 32}
CHECK = Path(llmq.__file__).parents[1] / "scripts/check_resume.py"
UNLIKE = ["balanced", "best 2 bits", "target-bpw", "signround", "gguf", "experts", "shared kv", "self"]
"""Recipes that differ in what they keep between two blocks; the script alone kills all twelve, twenty times."""


def test_killed_at_random_moments_whatever_is_kept_ends_in_the_same_bytes():
    done = subprocess.run(
        [sys.executable, CHECK, "--kills", "1", "--json", "--only", *UNLIKE],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(UNLIKE) and all(len(f["trials"]) == 1 and f["events"] > 100 for f in found)
    assert sum(t["went on"] for f in found for t in f["trials"]) >= len(UNLIKE) // 2


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_llama, tokenizer_bos):
    """A folder with a model of 2 blocks and a text."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama().save_pretrained(folder / "src")
    tokenizer_bos.save_pretrained(folder / "src")
    (folder / "text.txt").write_text(make_prose(2000))
    return folder


@pytest.fixture(scope="module")
def whole(root):
    """What a run that nothing ends writes, its head quantized too."""
    quantized(root, root / "out", lm_head=True)
    return held(root / "out")


def quantized(root, out, **changes):
    options = OPTIONS | {"calib": str(root / "text.txt")} | changes
    return llmq.quantize(str(root / "src"), out, warn=str, **options)


@pytest.fixture
def command(root, tmp_path):
    """`command(**changes)` quantizes the model."""
    return lambda **changes: quantized(root, tmp_path / "out", **changes)


@pytest.fixture
def ahead(root, tmp_path):
    """`ahead(**changes)` says what a plan of `command` does of an earlier run."""
    options = OPTIONS | {"calib": str(root / "text.txt"), "seconds": 0.01}
    return lambda **changes: llmq.plan(str(root / "src"), tmp_path / "out", **{**options, **changes}).goes_on


@pytest.fixture
def broken(monkeypatch):
    """`broken(i)` has block `i` end in an interrupt from then on, `broken(None)` none."""
    quantize = block.quantize_block

    def fail_at(at):
        def failing(plan, i, *more):
            if i == at:
                raise KeyboardInterrupt
            return quantize(plan, i, *more)

        monkeypatch.setattr(run, "quantize_block", failing)

    return fail_at


def held(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupt_says_where_the_same_command_goes_on(command, whole, broken, tmp_path, caplog, at):
    broken(at)
    with pytest.raises(KeyboardInterrupt) as caught:
        command(lm_head=True)
    stage, where = tmp_path / "out.llmq-partial", "behind the last of 2 blocks" if at == 2 else f"block {at} of 2"
    if at == 0:  # nothing is lost
        assert not hasattr(caught.value, "__notes__") and not stage.exists()
        return
    (note,) = caught.value.__notes__
    assert note.endswith(f"; the same command goes on from {where}; --overwrite begins anew")
    broken(None)
    with caplog.at_level(logging.WARNING):
        command(lm_head=True)
    assert f"going on from {where}" in caplog.text
    assert held(tmp_path / "out") == whole and not stage.exists()


@pytest.mark.parametrize("at", [1, 2])
def test_a_plan_says_where_the_command_goes_on_and_touches_nothing(command, ahead, broken, tmp_path, at):
    assert ahead() is None
    broken(at)
    with pytest.raises(KeyboardInterrupt):
        command(lm_head=True)
    before = held(tmp_path / "out.llmq-partial/journal")
    where = "behind the last of 2 blocks" if at == 2 else "block 1 of 2"
    assert ahead(lm_head=True).startswith(f"from {where}, in {tmp_path}/out.llmq-partial (")
    assert ahead(overwrite=True) is None
    with pytest.raises(LlmqError, match=r"another command \(bits 4, not 3\).*--overwrite to begin anew"):
        ahead(lm_head=True, bits=3)
    assert held(tmp_path / "out.llmq-partial/journal") == before


def test_another_command_is_refused_with_the_first_difference(command, broken, monkeypatch):
    broken(1)
    with pytest.raises(KeyboardInterrupt):
        command()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "read", None)  # before anything takes long
        for changes, said in (
            ({"bits": 3}, "bits 4, not 3"),
            ({"samples": 5}, "samples 4, not 5"),
            ({"dtype": "bfloat16"}, "dtype 'torch.float32', not 'torch.bfloat16'"),
        ):
            with pytest.raises(LlmqError, match=f"of another command \\({said}\\).*--overwrite to begin anew"):
                command(**changes)
    broken(None)
    assert command(bits=3, overwrite=True)["linears"]


def test_a_blend_goes_on_with_what_the_model_wrote_and_a_change_of_any_text_is_refused(
    command, broken, tmp_path, monkeypatch
):
    for name, seed in (("a.txt", 3), ("b.txt", 4)):
        (tmp_path / name).write_text(make_prose(2000, seed=seed))
    calib = [str(tmp_path / "a.txt"), f"{tmp_path}/b.txt:weight=2", "self"]
    whole = command(calib=calib)
    shutil.rmtree(tmp_path / "out")
    broken(1)
    with pytest.raises(KeyboardInterrupt):
        command(calib=calib)
    broken(None)
    text, then = tmp_path / "b.txt", (tmp_path / "b.txt").stat()
    text.write_text(make_prose(2000, seed=5))
    with pytest.raises(LlmqError, match=r"another command \(calib file .*b.txt"):
        command(calib=calib)
    text.write_text(make_prose(2000, seed=4))
    os.utime(text, ns=(then.st_atime_ns, then.st_mtime_ns))
    monkeypatch.setattr(calibration, "tokens", None)  # what was read and written once is kept
    assert command(calib=calib)["tensors"] == whole["tensors"]


def test_another_version_or_text_is_refused(command, broken, tmp_path, monkeypatch):
    text = tmp_path / "texts/more/text.txt"
    text.parent.mkdir(parents=True)
    text.write_text(make_prose(2000))
    folder = str(text.parents[1])  # which looks the same whatever its folders hold
    broken(1)
    with pytest.raises(KeyboardInterrupt):
        command(calib=folder)
    text.write_text(make_prose(2000, seed=1))
    with monkeypatch.context() as patch, pytest.raises(LlmqError, match=r"another command \(torch '.*', not '9.9'\)"):
        patch.setattr(torch, "__version__", "9.9")
        command(calib=folder)
    for _ in range(2):  # what was finished is still there the second time
        with pytest.raises(LlmqError, match=r"has changed since .*\(sha256 of its tokens .*what was finished stays"):
            command(calib=folder)


def test_another_number_of_threads_is_said(command, broken, caplog):
    broken(1)
    with pytest.raises(KeyboardInterrupt):
        command()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        broken(None)
        command()
    finally:
        torch.set_num_threads(before)
    assert f"this run began with {before} threads, not {before + 1}" in caplog.text


def test_without_calibration_no_hidden_states_are_written(command, broken, tmp_path):
    broken(1)
    with pytest.raises(KeyboardInterrupt):
        command(method="rtn", calib=None, samples=None, seq_len=None)
    left = {p.name for p in (tmp_path / "out.llmq-partial/journal").iterdir()}
    assert left == {"step-00000", "now.json", "synced.json", "threads"}
