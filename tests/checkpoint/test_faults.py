"""Killed or out of disk at any step: OUT is the old one or the new one, whole, and the same command ends the matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _tiny import make_prose

import llmq

FAULTS = Path(__file__).with_name("faults.py")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
KINDS = {  # OUT, what the old one was made with, what the new one is
    "safetensors": ("out", ["--group-size", "32", "--bits", "8"], ["--group-size", "32"]),
    "gguf": ("out.gguf", ["--type", "Q4_0"], ["--type", "Q8_0"]),
    "shards over shards": ("out.gguf", ["--type", "F32", "--split-max-size", "1M"],
                           ["--type", "BF16", "--override", "blk:type=F32", "--split-max-size", "1M"]),
    "one file over shards": ("out.gguf", ["--type", "F16", "--split-max-size", "1M"], ["--type", "Q8_0"]),
    "calibrated": ("out", ["--group-size", "32"], ["--method", "qep,gptq", "--calib", "TEXT", "--samples", "4",
                                                   "--seq-len", "32", "--group-size", "32"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama, tokenizer_bos):
    folder = tmp_path_factory.mktemp("source")
    folder.with_name("text.txt").write_text(make_prose(500))
    tiny_llama(**WIDE).save_pretrained(folder)
    tokenizer_bos.save_pretrained(folder)
    return folder


def trials(tmp_path, source, kind, fault, count=20):
    """Return what OUT's folder holds with the old OUT, with the new one, and the trials with a fault."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_text("years of work")
    name, old, new = KINDS[kind]
    command = ["quantize", str(source), name, "--method", "rtn"]
    new = [str(source.with_name("text.txt")) if word == "TEXT" else word for word in new]
    runs = [json.dumps(command + old), json.dumps([*command, *new, "--overwrite"])]
    arguments = [fault, str(work), str(count), "0", *runs]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(llmq.__file__).parents[1])}
    done = subprocess.run([sys.executable, FAULTS, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == 0 and report["said"] == "" and report["old"] != report["new"], report["said"]
    return report["old"], report["new"], report["trials"]


def within(some, files):
    return all(files.get(name) == digest for name, digest in some.items())


def ended(new, files):
    """Say whether a folder holds the new OUT and nothing else; shards over shards differ in their number each time."""
    shards = [name for name in files if "-of-" in name]
    whole = {f"out-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))}
    return files == new or ("out-00001-of-00008.gguf" in new and files.keys() == {"notes.txt"} | whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "calibrated"])
def test_killed_at_any_step_out_is_the_old_or_the_new_one(tmp_path, source, kind):
    old, new, found = trials(tmp_path, source, kind, "kill")
    ends = [(within(old, t["held"]), within(new, t["held"])) for t in found]
    assert len(found) == 20 and all(t["status"] == -9 for t in found) and all(was or is_ for was, is_ in ends), ends
    assert {was for was, _ in ends} == {True, False}
    for trial in found:
        assert trial["next"] == 0 and ended(new, trial["next held"]), trial
        left = any(".llmq-partial" in name for name in trial["held"])
        assert bool(trial["next said"]) == left, trial  # what is removed, or put in place, is named


def test_killed_without_an_exchange_the_next_run_finds_the_old_or_the_new_one(tmp_path, source):
    old, new, found = trials(tmp_path, source, "safetensors", "kill-no-exchange", 10)
    aside = {name.replace("out/", "out.llmq-partial/old/"): digest for name, digest in old.items()}
    for trial in found:
        assert within(old, trial["held"]) or within(new, trial["held"]) or within(aside, trial["held"]), trial
        assert trial["next"] == 0 and trial["next held"] == new, trial


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "shards over shards", "calibrated"])
def test_a_full_disk_at_any_write_is_one_line_and_the_old_one_is_whole(tmp_path, source, kind):
    again = kind == "calibrated"  # of the others, killed runs show it
    old, new, found = trials(tmp_path, source, kind, "full-again" if again else "full")
    for trial in found:
        if trial["status"] == 0:  # nothing was left to do but cleaning up, or it was no file of ours
            assert within(new, trial["held"]), trial
            continue
        assert trial["status"] == 1 and within(old, trial["held"]), trial
        assert trial["said"].startswith("error: ") and trial["said"].count("\n") == 1, trial
        assert "No space left on device" in trial["said"], trial
        stays = any(".llmq-partial" in name for name in trial["held"])
        assert ("stays in" in trial["said"]) == ("the same command" in trial["said"]) == stays, trial
        assert not again or (trial["next"] == 0 and trial["next held"] == new), trial
    assert sum(trial["status"] == 1 for trial in found) >= 15
    if again:
        assert sum("goes on from block 1 of 2" in t["said"] for t in found) > 3
        assert sum("going on from block 1 of 2" in t.get("next said", "") for t in found) > 3
