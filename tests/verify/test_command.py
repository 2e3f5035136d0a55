"""`llmq verify`: a line for each fault, PASS or FAIL last, and a status."""

import json
import shutil
from pathlib import Path

import pytest

from llmq import cli
from llmq.errors import LlmqError

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_right_checkpoint_passes(capsys, tmp_path):
    cli.verify(str(GOLDEN / "awq_w4g32"), str(GOLDEN / "float"), None, tmp_path / "report.json")
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
