"""What stands beside the weights: where they come from, and every file of the tokenizer."""

import json

import pytest
import yaml
from transformers import AutoTokenizer

from llmq.gguf.reader import GgufFile
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(src, out, **options):
    recipe = Recipe(**({"method": "rtn", "group_size": None if "type" in options else 32} | options))
    return quantize(prepare(str(src), recipe, "cpu"), out)


@pytest.fixture
def snapshot(tiny_checkpoint, tmp_path):
    """A checkpoint as the Hub's cache keeps it: links to blobs, in a folder named by the commit."""
    made = tiny_checkpoint()
    folder = tmp_path / "hub/models--org--Tiny-Llama/snapshots" / COMMIT
    folder.mkdir(parents=True)
    blobs = tmp_path / "hub/models--org--Tiny-Llama/blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / f"{i}")
        (folder / file.name).symlink_to(f"../../blobs/{i}")
    return folder


def test_a_source_in_the_cache_is_recorded_by_repository_and_commit(snapshot, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    summary = run(f"{link}/", tmp_path / "out")
    assert summary["source"] == {"name": "org/Tiny-Llama", "commit": COMMIT, "adapter": None}
    assert json.loads((tmp_path / "out/quantization.json").read_text())["source"] == summary["source"]
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/Tiny-Llama"
    assert f"from org/Tiny-Llama at commit {COMMIT};" in card and "# org/Tiny-Llama, 4-bit" in card


def test_a_gguf_file_is_called_by_the_repository(snapshot, tmp_path):
    out = tmp_path / "out.gguf"
    assert run(snapshot, out, format="gguf:pre=gpt-2", type="F16")["source"]["commit"] == COMMIT
    assert GgufFile(out).value("general.name") == "org/Tiny-Llama"


def test_every_chat_template_goes_with_the_weights(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates/tool_use.jinja").is_file()
    run(folder, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    run(folder, tmp_path / "out.gguf", format="gguf:pre=gpt-2", type="F16")
    file = GgufFile(tmp_path / "out.gguf")
    assert file.value("tokenizer.chat_template") == templates["default"]
    assert {n: file.value(f"tokenizer.chat_template.{n}") for n in ("tool_use", "rag")} == {
        n: templates[n] for n in ("tool_use", "rag")
    }
