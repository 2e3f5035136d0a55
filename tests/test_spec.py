"""The grammar of steps, and the errors it gives."""

import pytest

from llmq import spec
from llmq.types import LlmqError


def test_options_are_parsed_into_the_fields_types():
    step = spec.load("algorithms", "gptq:damp=0.05:act_order=false")
    assert step.damp == 0.05 and step.act_order is False


@pytest.mark.parametrize("folder", ["algorithms", "ranges", "grids", "formats", "families"])
def test_every_file_loads_dumps_and_describes_itself(folder):
    for name, line in spec.describe(folder):
        assert line.endswith(".") and len(line) < 140, (name, line)
        default = spec.load(folder, name)
        assert spec.load(folder, spec.dump(default)) == default


def test_dump_names_only_what_differs_from_the_defaults():
    assert spec.dump(spec.load("ranges", "mse:norm=2.4")) == "mse:norm=2.4"
    assert spec.dump(spec.load("ranges", "mse")) == "mse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtpq", "did you mean 'gptq'"),
        ("gptq:dmap=1", "no option 'dmap'"),
        ("gptq:damp=much", "wants float, not 'much'"),
        ("gptq:damp=2", "damp lies between 0 and 1"),
        ("gptq:damp", "no option 'damp'"),
        ("no_such_package.module", "no such Python module"),
    ],
)
def test_errors_name_the_cause_and_what_is_possible(text, message):
    with pytest.raises(LlmqError, match=message):
        spec.load("algorithms", text)


def test_a_third_party_file_is_loaded_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "their_step.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Theirs:\n    x: int = 1\n"
    )
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package/step.py").write_text((tmp_path / "their_step.py").read_text())
    (tmp_path / "their_package/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert spec.load("algorithms", "their_package.step:x=3").x == 3


def test_options_are_listed_as_they_are_written():
    assert spec.options("algorithms", "gptq") == "damp=0.01:prior=1.0:act_order=True:desc_act=False"
    assert spec.dump(spec.load("algorithms", f"gptq:{spec.options('algorithms', 'gptq')}")) == "gptq"
