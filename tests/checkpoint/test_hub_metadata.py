"""What is taken over from a source's card: only what has the form that the Hub gives it."""

import pytest

from llmq.checkpoint.hub_metadata import NO_CARD, source_card, task_of

FULL = """---
license: other
license_name: llama3.2
license_link: LICENSE
language:
- en
- no
- zh-Hans
tags: [chat, safetensors, "text with spaces", 7]
pipeline_tag: text-generation
base_model: [org/base, org/other]
extra_gated_prompt: "do not take this over"
---
# Card
---
license: mit
"""


def card(folder, text):
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return source_card(folder)


def test_what_has_a_form_is_taken_over(tmp_path):
    said, warnings = card(tmp_path, FULL)
    assert not warnings
    assert said.licence == {"license": "other", "license_name": "llama3.2"}  # whose LICENSE is nobody's to reach
    assert said.languages == ["en", "no", "zh-Hans"] and said.tags == ["chat", "text with spaces"]
    assert said.task == "text-generation" and said.base == "org/base"


def test_a_link_to_a_file_of_a_repository_leads_there(tmp_path):
    folder = tmp_path / "models--org--name/snapshots/c0ffee"
    folder.mkdir(parents=True)
    said, _ = card(folder, FULL)
    assert said.licence["license_link"] == "https://huggingface.co/org/name/blob/main/LICENSE"
    said, _ = card(folder, FULL.replace("LICENSE\n", "https://llama.com/license\n"))
    assert said.licence["license_link"] == "https://llama.com/license"
    for link in ("javascript:alert(1)", "../../other", "https://a b", '"https://x)<b>"'):
        assert "license_link" not in card(folder, FULL.replace("LICENSE\n", f"{link}\n"))[0].licence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter\n",
        "---\n---\n",
        "---\nlicense: [1, {a: b}]\nlanguage: {a: b}\ntags: 7\nbase_model: ../up\npipeline_tag: 'a b'\n---\n",
        "---\nlicense: 'a\n\n  b'\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
    ],
)
def test_what_has_none_is_not(tmp_path, text):
    assert card(tmp_path, text) == (NO_CARD, []) or card(tmp_path, text)[0].licence == {}


@pytest.mark.parametrize(
    "text",
    [
        "---\n- a list\n---\n",
        "---\na: &x [1]\nb: *x\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\na: b: c\n---\n",
        "---\nlicense: mit\nlicense: gpl\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_is_a_warning(tmp_path, text):
    said, (warning,) = card(tmp_path, text)
    assert said == NO_CARD and "README.md" in warning and "takes no licence" in warning and "\n" not in warning


def test_a_folder_without_a_card(tmp_path):
    assert source_card(tmp_path) == (NO_CARD, [])


def test_the_task_is_that_of_the_class():
    assert task_of({"architectures": ["LlamaForCausalLM"]}) == "text-generation" == task_of({"architectures": "x"})
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
    assert task_of(whole) == "image-text-to-text"
