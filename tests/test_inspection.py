import io
import json

import pytest
from rich.console import Console

from llmq.errors import LlmqError
from llmq.inspection import inspect


def shown(folder, **options):
    out = io.StringIO()
    for table in inspect(str(folder), **options):
        Console(file=out, width=300).print(table)
    return out.getvalue()


LINE = {"bits": 4, "method": "rtn", "weight_error": 0.0123}


@pytest.mark.parametrize(
    "record",
    ["{", "[1]", "null", '{"recipe": {}}', '{"size": {"bits_per_weight": 4}}', '{"size": 4, "recipe": {}}',
     '{"size": {}, "recipe": {}, "linears": {"a": 4}}', '{"size": {}, "recipe": {}, "linears": []}',
     '{"size": {}, "recipe": {}, "linears": {"a": {"output_error": "x"}}}'],
)  # fmt: skip
def test_a_record_of_another_shape_is_one_line(tiny_checkpoint, record):
    folder = tiny_checkpoint()
    (folder / "quantization.json").write_text(record)
    with pytest.raises(LlmqError, match=r"quantization\.json"):
        shown(folder, linears=True)


def test_a_record_is_shown_with_its_errors(tiny_checkpoint):
    folder = tiny_checkpoint()
    record = {"size": {"bits_per_weight": 4.25}, "recipe": {"bits": 4}, "linears": {"model.x": LINE}}
    (folder / "quantization.json").write_text(json.dumps(record))
    said = shown(folder, linears=True)
    assert "4.25" in said and "1.230e-02" in said and "bits=4" in said


def test_quantization_config_null_is_float_and_a_string_is_refused(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert "none (float)" in shown(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": "gptq"}))
    with pytest.raises(LlmqError, match="quantization_config"):
        shown(folder)
