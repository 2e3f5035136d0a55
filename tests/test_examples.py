"""docs/examples.md: its commands run as they stand, one page after the other, on a tiny model and less text."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmq import cli

PAGE = (Path(__file__).parents[1] / "docs/examples.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
LESS = {"quantize": ["--samples", "8", "--seq-len", "64"], "eval": ["--window", "64", "--windows", "4"]}


def run(monkeypatch, command):
    words = shlex.split(command)
    assert words[0] == "llmq", command
    monkeypatch.setattr(sys, "argv", words + LESS.get(words[1], []))
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert not e.value.code, command


def test_the_examples_run(tiny_checkpoint, prose, tmp_path, monkeypatch, capfd):
    """A folder that the tests of a command name is made by the commands before it."""
    tiny_checkpoint(hidden_size=128, intermediate_size=256).rename(tmp_path / "my-llama")
    (tmp_path / "text.txt").write_text(prose(4000))
    (tmp_path / "held-out.txt").write_text(prose(1500, seed=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "my-lora")
    monkeypatch.chdir(tmp_path)
    assert len(re.findall("^## ", PAGE, re.MULTILINE)) == 5 and len(COMMANDS) > 9
    for command in COMMANDS:
        run(monkeypatch, command)
    assert capfd.readouterr().out.count("perplexity") >= 2
