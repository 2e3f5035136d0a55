"""Short words of candidates, what all share, and which GPU runs what."""

import pytest

from llmq.commands.compare import _parted
from llmq.comparing.candidates import candidates, of_word
from llmq.comparing.hardware import GPUS, gpu, runs
from llmq.recipe import Recipe
from llmq.types import LlmqError


def test_words_stand_for_what_quantize_takes():
    assert of_word("w4a16") == {"scheme": "w4a16"} and of_word("fast") == {"quality": "fast"}
    assert of_word("q4_k_m") == {"format": "gguf", "type": "Q4_K_M"} and of_word("mlx") == {"format": "mlx"}
    assert of_word("compressed-tensors") == of_word("compressed_tensors") == {"format": "compressed-tensors"}
    for word in ("awq", "rtn", "smoothquant", "nvfp4", "w8a8", "gptq", "q8_0", "balanced"):
        Recipe.load(None, of_word(word)).resolved()  # none is refused
    with pytest.raises(LlmqError, match="--schemes w5 is no scheme, format, quality or type of ggml .there are: w4a16"):
        of_word("w5")


def test_options_of_all_go_to_those_for_which_they_mean_something():
    shared = {"group_size": "64", "calib": "t.txt", "quality": "fast", "samples": None}
    found = candidates(["w4a16", "AWQ", "q4_k_m", "w8a8"], {"mine": {"bits": 3, "group_size": "32"}}, shared)
    assert found["w4a16"] == {"scheme": "w4a16", "group_size": "64", "calib": "t.txt", "quality": "fast"}
    assert found["awq"].keys() == {"method", "range", "sym", "format", "group_size", "calib"}
    assert found["q4_k_m"] == {"format": "gguf", "type": "Q4_K_M", "calib": "t.txt", "quality": "fast"}
    assert "group_size" not in found["w8a8"] and found["mine"]["group_size"] == "32"
    with pytest.raises(LlmqError, match="names w4a16 twice"):
        candidates(["w4a16", "w4a16"], {}, {})
    with pytest.raises(LlmqError, match="names nothing"):
        candidates([""], {}, {})


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/abs", "a\nb", "x.gguf", "tokens", "compare.json", "-x"]
)
def test_a_name_that_no_folder_should_have_is_refused_before_any_work(name):
    with pytest.raises(LlmqError, match="is no plain name"):
        candidates([], {name: {"bits": 3}}, {})
    assert candidates([], {"my 3.5-bit_x+": {"bits": 3}}, {})


def test_names_with_options_are_read_as_the_command_line_reads_them():
    words, named = _parted(["w4a16,awq", "mine=--bits 3 --asym --skip 'a,b' --skip c", "q8_0"])
    assert words == ["w4a16", "awq", "q8_0"]
    assert named == {"mine": {"bits": 3, "sym": False, "skip": ("a,b", "c")}}
    for text, said in (
        ("m=--no-such 3", "[Nn]o such option"),
        ("m=--bits x", "Invalid value for .--bits"),
        ("m=--bits '3", "quotation"),
        ("m=--help", "[Nn]o such option"),
        ("m=--show-completion", "[Nn]o such option"),
        ("m=--device cpu", "--device is not of a recipe"),
    ):
        with pytest.raises(LlmqError, match=said):
            _parted([text])
    with pytest.raises(LlmqError, match="names 'm' twice"):
        _parted(["m=--bits 3", " m =--bits 4"])


@pytest.mark.parametrize(
    ("options", "runs_on", "not_on", "alone_on"),
    [
        ({"bits": 4}, ("t4", "mi300x", "rtx4090"), (), ()),
        ({"scheme": "w8a8"}, ("a100", "rtx4090"), ("t4",), ()),
        ({"scheme": "fp8"}, ("l40s", "h100"), ("t4",), ("a100",)),
        ({"scheme": "nvfp4"}, ("b200", "rtx5090"), ("mi300x",), ("rtx4090", "t4")),
        ({"scheme": "mxfp4a16"}, ("a100",), ("t4",), ()),
        ({"format": "gguf"}, ("t4", "mi300x"), (), ()),
        ({"format": "mlx"}, (), ("h100",), ()),
    ],
)
def test_what_runs_where(options, runs_on, not_on, alone_on):
    recipe = Recipe.load(None, options)
    for name in runs_on:
        assert runs(recipe, 1e9, gpu(name)) == (True, "")
    for name in not_on:
        assert not runs(recipe, 1e9, gpu(name)).runs
    for name in alone_on:
        assert runs(recipe, 1e9, gpu(name)).runs and "weights alone" in runs(recipe, 1e9, gpu(name)).why
    assert "do not fit 24 GB" in runs(Recipe(), 30e9, gpu("NVIDIA GeForce RTX 4090")).why


def test_gpus_by_the_names_that_people_write():
    assert gpu("RTX 4090") == gpu("4090") == gpu("rtx-4090") == GPUS["rtx4090"]
    assert gpu("A100 80GB SXM") == GPUS["a100"] and gpu("MI300X") == GPUS["mi300x"]
    with pytest.raises(LlmqError, match="--on z80: no such GPU is known"):
        gpu("z80")
