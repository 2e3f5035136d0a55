"""`llmq verify`: a line for each fault, PASS or FAIL last, and a status."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq import cli
from llmq.errors import LlmqError
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_right_checkpoint_passes(capsys, tmp_path):
    cli.verify(str(GOLDEN / "awq_w4g32"), str(GOLDEN / "float"), json_file=tmp_path / "report.json")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("PASS: 1 weight files") and "14 packed linears" in last
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] and written["failures"] == [] and written["figures"]["kl"] > 0


def test_a_wrong_one_fails_and_names_what_is_wrong(capsys, tmp_path):
    shutil.copytree(GOLDEN / "awq_w4g32", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(LlmqError, match="is not right: model.layers.0"):
        cli.verify(str(tmp_path / "out"), None, None, None)
    printed = capsys.readouterr().out.strip().splitlines()
    assert len([line for line in printed if line.startswith("wrong: model.layers.")]) == 28  # qzeros and scales
    assert printed[-1].startswith("FAIL: 28 found wrong in")


def test_scales_beyond_float32_are_named_and_nothing_else_is_printed(tmp_path, recwarn):
    """numpy would warn of each product that overflows, in lines of its own."""
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "ct_pack_w4g32_sym", folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("up_proj.weight_scale"))
    tensors[name] = torch.full(tensors[name].shape, 3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = verify(folder)
    assert not report.passed and not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
