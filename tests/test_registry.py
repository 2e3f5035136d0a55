"""The grammar of steps, and the errors it gives."""

import zlib

import pytest

from llmq import registry
from llmq.types import LlmqError


def test_options_are_parsed_into_the_fields_types():
    step = registry.load("algorithms", "gptq:damp=0.05:act_order=false")
    assert step.damp == 0.05 and step.act_order is False


@pytest.mark.parametrize("folder", ["algorithms", "ranges", "grids", "formats", "families"])
def test_every_file_loads_dumps_and_describes_itself(folder):
    for name, line in registry.describe(folder):
        assert line.endswith(".") and len(line) < 140, (name, line)
        default = registry.load(folder, name)
        assert registry.load(folder, registry.dump(default)) == default


def test_dump_names_only_what_differs_from_the_defaults():
    assert registry.dump(registry.load("ranges", "mse:norm=2.4")) == "mse:norm=2.4"
    assert registry.dump(registry.load("ranges", "mse")) == "mse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtpq", "did you mean 'gptq'"),
        ("gptq:dmap=1", "no option 'dmap'"),
        ("gptq:damp=much", "damp takes a number, not 'much'"),
        ("gptq:damp=nan", "damp takes a number"),
        ("gptq:damp=1e400", "damp takes a number"),
        ("descent:rounds=99999999999999999999", "rounds takes a whole number"),
        ("descent:rounds=1.5", "rounds takes a whole number"),
        ("gptq:act_order=2", "act_order takes true or false"),
        ("gptq:damp=0.1:damp=0.2", "damp is given twice"),
        ("gptq:damp=2", "damp lies between 0 and 1"),
        ("gptq:damp", "no option 'damp'"),
        ("no_such_package.module", "'no_such_package.module' cannot be imported: .*No module named 'no_such_package'"),
        ("os.nosuch", "No module named 'os.nosuch'"),
        (".os", "'.os' is no third-party module"),
        ("os.", "is no third-party module"),
        ("a..b", "is no third-party module"),
        ("../algorithms/gptq.py", "is no third-party module"),
        ("llmq.calibration", "is no third-party module; llmq's own algorithms are named without dots"),
        ("_hessian", "'_hessian' is none of llmq's algorithms"),
        ("algorithms/gptq", "is none of llmq's"),
        ("GPTQ" * 10**5, "is none of llmq's"),
        ("unittest.mock", "must define exactly one public dataclass"),
    ],
)
def test_errors_name_the_cause_and_what_is_possible(text, message):
    with pytest.raises(LlmqError, match=message) as e:
        registry.load("algorithms", text, code=True)
    assert len(str(e.value)) < 500


def test_a_third_party_file_is_loaded_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "their_step.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Theirs:\n    x: int = 1\n"
    )
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package/step.py").write_text((tmp_path / "their_step.py").read_text())
    (tmp_path / "their_package/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry.load("algorithms", "their_package.step:x=3", code=True).x == 3
    for folder, text in (("algorithms", "their_package.step"), ("formats", "their_package.step"), ("grids", ".os")):
        with pytest.raises(LlmqError, match=f"is none of llmq's {folder}"):
            registry.load(folder, text)  # a name that a file may have said
    with pytest.raises(LlmqError, match="none of the ranges: Theirs has no interval"):
        registry.load("ranges", "their_package.step", code=True)
    with pytest.raises(LlmqError, match="none of the formats: Theirs has no .*assign, .*quant_method, sink$"):
        registry.load("formats", "their_package.step", code=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1/0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("class Odd(Exception): pass\nraise Odd('a\\nb')", "cannot be imported: Odd: a b"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("", "exactly one public dataclass"),
        ("@dataclass\nclass A:\n    x: int", "TypeError: .*missing 1 required positional argument: 'x'"),
        ("@dataclass\nclass A:\n    x: Nowhere = 1", "NameError: name 'Nowhere' is not defined"),
        ("@dataclass\nclass A:\n    x: int = 1\n    def __post_init__(self): 1/0", "ZeroDivisionError"),
        (
            "@dataclass\nclass A:\n    x: int = 1\n    def __post_init__(self): raise ValueError('too odd')",
            ": too odd$",
        ),
    ],
)
def test_whatever_a_third_party_file_raises_is_one_line(tmp_path, monkeypatch, body, message):
    name = f"odd_{zlib.crc32(body.encode())}"  # a module is imported once
    (tmp_path / name).mkdir()
    top = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (tmp_path / name / "step.py").write_text(f"{top}{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LlmqError, match=message) as e:
        registry.load("algorithms", f"{name}.step", code=True)
    assert "\n" not in str(e.value)


def test_options_are_listed_as_they_are_written():
    assert registry.options("algorithms", "gptq") == "damp=0.01:prior=1.0:act_order=True:desc_act=False"
    assert registry.dump(registry.load("algorithms", f"gptq:{registry.options('algorithms', 'gptq')}")) == "gptq"
