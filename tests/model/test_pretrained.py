"""The door to transformers: nothing of a config acts, and whatever transformers or tokenizers raise is one line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tokenizers import Tokenizer

import llmq
from llmq.checkpoint import Source, resolve
from llmq.checkpoint.source import side_files
from llmq.model.pretrained import blank_model, foreign, model_config, shut, tokenizer_of
from llmq.types import LlmqError


def edit(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; ... removes one."""
    said = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


class PanicException(BaseException):
    """As pyo3 makes one: a BaseException of a module that cannot be imported."""

    __module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (KeyError("metadata"), "KeyError: 'metadata'"),
        (ValueError("two\nlines"), "two lines"),
        (AttributeError("no x"), "AttributeError: no x"),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (RecursionError("too deep"), "too deep"),
        (ImportError("no kernels"), "no kernels"),
        (StrictDataclassFieldValidationError("hidden_size", TypeError("int")), "hidden_size"),
        (Exception("tokenizers says no"), "tokenizers says no"),
        (PanicException("index out of bounds"), "index out of bounds"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_they_raise_is_one_line(raised, said):
    with pytest.raises(LlmqError, match=f"^the file: .*{said}") as caught, foreign("the file"):
        raise raised
    assert "\n" not in str(caught.value) and caught.value.__cause__ is raised


class OurError(Exception):
    """Of no library that is called."""


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3), LlmqError("ours"), OurError("ours too")])
def test_interrupts_and_what_is_ours_pass(raised):
    with pytest.raises(type(raised)) as caught, foreign("the file"):
        raise raised
    assert caught.value is raised


def test_tokenizers_own_exception_is_what_it_was_taken_for():
    with pytest.raises(Exception) as caught:
        Tokenizer.from_str("{}")
    assert type(caught.value) is Exception


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"head_dim": 10**10}, "head_dim is 10000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"rms_norm_eps": "x"}, "config.json.*rms_norm_eps"),
        ({"rope_parameters": []}, "config.json"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "config.json"),
        ({"dtype": "float99"}, "config.json.*float99"),
        ({"pad_token_id": 10**9}, "config.json"),
        ({"id2label": 5}, "config.json.*items"),
        ({"model_type": ["llama"]}, "config.json"),
        ({"model_type": ...}, "config.json"),
        ({"hidden_act": "nonsense"}, "config.json.*nonsense"),
        ({"to_dict": 1}, "config.json"),
        ({"quantization_config": [1]}, "quantization_config.*must be of type dict"),
        ({"transformers_weights": "../x.safetensors"}, r"no model\.safetensors"),
    ],
    ids=lambda c: json.dumps({k: str(v) for k, v in c.items()}) if isinstance(c, dict) else "",
)
def test_a_config_that_no_model_has_is_one_line_at_once(tiny_checkpoint, change, message, capfd):
    folder, began = tiny_checkpoint(), time.monotonic()
    capfd.readouterr()
    edit(folder / "config.json", **change)
    with pytest.raises(LlmqError, match=message):
        llmq.load(folder)
    assert time.monotonic() - began < 20
    assert capfd.readouterr().err == ""


def test_a_table_that_would_fill_the_memory_is_refused(tmp_path):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, attention_types=[[["global"], 2]], num_heads=2)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", max_position_embeddings=60_000)
    source = Source(tmp_path)
    with pytest.raises(LlmqError, match=r"tables of \d+ GB"):
        blank_model(source, model_config(source), buffers=True)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_does_not_choose_code(tiny_checkpoint, key):
    folder = tiny_checkpoint()
    edit(folder / "config.json", **{key: "kernels-community/flash-attn"})
    assert llmq.load(folder, device="cpu").config._attn_implementation == "sdpa"


def test_the_hub_is_shut_while_a_folder_is_read_and_open_again():
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="x"), shut():
        assert constants.is_offline_mode()
        raise ValueError("x")
    assert before == constants.HF_HUB_OFFLINE


def test_null_is_no_quantization(tiny_checkpoint):
    folder = tiny_checkpoint()
    edit(folder / "config.json", quantization_config=None)
    assert Source(folder).quantization is None
    assert llmq.load(folder, device="cpu").config.model_type == "llama"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "AutoModelForCausalLM"}, "no tokenizer of transformers"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "no tokenizer of transformers"),
        ("config.json", {"tokenizer_class": "pipeline"}, "no tokenizer of transformers"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "names of files beside it"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "no tokenizer that transformers can load"),
        ("tokenizer.json", {"added_tokens": ...}, "no tokenizer that transformers can load"),
        ("tokenizer_config.json", {"bos_token": {"a": 1}}, "no tokenizer that transformers can load"),
    ],
)
def test_a_tokenizer_that_is_none_is_one_line(tiny_checkpoint, file, change, message):
    folder = tiny_checkpoint()
    edit(folder / file, **change)
    with pytest.raises(LlmqError, match=message):
        llmq.load_tokenizer(folder)


def test_a_tokenizer_needs_nothing_of_the_models_config(tiny_checkpoint, tokenizer_bos):
    folder = tiny_checkpoint()
    edit(folder / "config.json", num_hidden_layers=10**9, rms_norm_eps="x")
    assert tokenizer_of(folder)("the war").input_ids == tokenizer_bos("the war").input_ids
    (folder / "config.json").unlink()
    assert tokenizer_of(folder)("the war").input_ids == tokenizer_bos("the war").input_ids


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "model.safetensors", "additional_chat_templates/a.jinja", "notes.txt"]
)
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(tiny_checkpoint, tmp_path, name):
    folder, outside = tiny_checkpoint(), tmp_path / "outside"
    (folder / name).parent.mkdir(exist_ok=True)
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    for reader in (Source, side_files, tokenizer_of):
        with pytest.raises(LlmqError, match=f"{Path(name).name} is a link to .*outside the checkpoint"):
            reader(folder)


def test_a_fifo_is_refused_not_waited_for(tiny_checkpoint):
    folder = tiny_checkpoint()
    os.mkfifo(folder / "generation_config2.json")
    with pytest.raises(LlmqError, match="neither a file nor a folder"):
        Source(folder)


@pytest.mark.parametrize("where", ["../outside.safetensors", "{tmp}/outside.safetensors", "a\0b", "x" * 300])
def test_an_index_that_leads_out_of_the_folder_is_refused(tiny_checkpoint, tmp_path, where):
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    weight_map = {"lm_head.weight": where.format(tmp=folder.parent)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(LlmqError, match="lies outside|is missing"):
        Source(folder)


def test_a_hub_caches_own_links_are_followed(tiny_checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_checkpoint().iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    linked = tmp_path / "models"
    linked.symlink_to(snapshot, target_is_directory=True)
    for folder in (snapshot, linked):
        assert torch.is_tensor(Source(resolve(str(folder))).get("lm_head.weight"))
        assert llmq.load_tokenizer(folder)("a").input_ids
    (blobs / "x").symlink_to("/etc/passwd")
    (snapshot / "x.txt").symlink_to("../../blobs/x")
    with pytest.raises(LlmqError, match="outside the checkpoint"):
        Source(snapshot)


def test_an_id_that_no_vocabulary_reaches_is_refused(tiny_checkpoint):
    folder = tiny_checkpoint()
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["vocab"]["never"] = 2**31 - 2  # of which a list with a place for every id takes gigabytes
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(LlmqError, match="a token has the id 2147483646"):
        tokenizer_of(folder)
