"""`llmq export --to onnx`: a folder that onnxruntime-genai chats with, the codes in it, what is refused and noticed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import make_tokenizer

import llmq
from llmq.checkpoint import Source
from llmq.checkpoint.digest import holds
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.export._run import export
from llmq.export.onnx import Onnx
from llmq.model.pretrained import blank_model, model_config
from llmq.onnx import graph
from llmq.onnx.graph import stored_tensors
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A peer's checkpoint, symmetric, with a tokenizer beside it."""
    made = shutil.copytree(GOLDEN / "gptq_v1_w4g32_sym", tmp_path_factory.mktemp("golden") / "g")
    make_tokenizer(bos=True).save_pretrained(made)
    return made


@pytest.mark.parametrize("to", ["onnx", "onnx:qdq"])
def test_onnxruntime_genai_says_what_transformers_does(tmp_path, tiny_checkpoint, to):
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (pip install -e '.[test]')")
    src = tiny_checkpoint(tie_word_embeddings=True)
    quantize(prepare(str(src), Recipe(method="rtn", group_size=32, dtype="float32"), "cpu"), tmp_path / "q")
    export(str(tmp_path / "q"), tmp_path / "out", to)
    reference = llmq.load(tmp_path / "q", dtype=torch.float32, backend="reference")
    model = genai.Model(str(tmp_path / "out"))
    ids = genai.Tokenizer(model).encode("the cat sat").tolist()
    assert ids == llmq.load_tokenizer(tmp_path / "q")("the cat sat", add_special_tokens=False)["input_ids"]
    want = reference.generate(torch.tensor(ids)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(want), min_length=len(want), do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.asarray(ids, np.int32)[None])
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == want.tolist()


def test_the_codes_of_the_folder_are_those_of_the_checkpoint(tmp_path, golden):
    for to in ("onnx", "onnx:qdq"):
        export(str(golden), tmp_path / to[5:] / "out", to)
    source = Source(golden)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    words, nibbles = ({n: raw for n, _, raw in stored_tensors(tmp_path / d / "out")} for d in ("", "qdq"))
    for name in packed.linears:
        codes = packed.qtensor(name).codes.numpy()
        two = np.frombuffer(words[f"{name}.codes"], np.uint8)
        assert np.array_equal(np.stack([two & 15, two >> 4], -1).reshape(codes.shape), codes)
        two = np.frombuffer(nibbles[f"{name}.codes"], np.uint8)
        signed = np.stack([two & 15, two >> 4], -1).reshape(codes.T.shape)
        assert np.array_equal((signed ^ 8).T, codes)  # two's complement of code - 8


def test_the_folder_is_recorded_replaced_and_replaced_only_if_it_is_one(tmp_path, golden):
    out = tmp_path / "out"
    done = export(str(golden), out, "onnx")
    record = json.loads((out / "export.json").read_text())
    assert holds(record) and record["outcomes"] == done["outcomes"] == {"values exact": 14}
    assert record["target"] == {
        "onnx": {"accuracy_level": 0, "context": None, "dialect": "genai", "head": "float", "io": "float32"}
    }
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with pytest.raises(LlmqError, match="a model for another runtime that llmq export made"):
        Source(out).names()
    before = (out / "model.onnx.data").read_bytes()
    with pytest.raises(LlmqError, match="exists"):
        export(str(golden), out, "onnx")
    export(str(golden), out, "onnx", overwrite=True)
    assert (out / "model.onnx.data").read_bytes() == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(LlmqError, match=r"notes\.txt, which is no part"):
        export(str(golden), out, "onnx", overwrite=True)


def test_a_byte_that_changed_on_the_disk_is_noticed(tmp_path, golden, monkeypatch):
    save = graph.Graph.save

    def damage(self, *args):
        save(self, *args)
        with (self.folder / graph.DATA).open("r+b") as f:
            f.seek(100)
            f.write(b"\xff\xff\xff\xff")

    monkeypatch.setattr(graph.Graph, "save", damage)
    with pytest.raises(LlmqError, match="is not what was written"):
        export(str(golden), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_what_means_nothing_is_refused(tmp_path, golden, monkeypatch, capsys):
    with pytest.raises(LlmqError, match="onnx:qdq has no accuracy_level"):
        Onnx(dialect="qdq", accuracy_level=4)
    with pytest.raises(LlmqError, match="llmq export IN MID --to gptq --requantize Q8_0"):
        export(str(golden), tmp_path / "out", "onnx", requantize="Q8_0")
    with pytest.raises(LlmqError, match=r"genai.*qdq"):
        export(str(golden), tmp_path / "out", "onnx:tensorrt")
    monkeypatch.setattr("llmq.extras.find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"pip install 'llmq-quant\[onnx\]'$"):
        export(str(golden), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_what_a_user_should_know_is_said(tmp_path, tiny_checkpoint, golden):
    src = str(tiny_checkpoint())
    recipes = {"falling": {"range": "mse", "bits": 4}, "w8a8": {"bits": 8, "act_bits": 8, "group_size": "channel"}}
    said = {}
    for name, how in recipes.items():
        recipe = Recipe(**({"method": "rtn", "group_size": 32, "format": "compressed-tensors"} | how))
        quantize(prepare(src, recipe, "cpu"), tmp_path / name)
        said[name] = export(str(tmp_path / name), tmp_path / f"{name}-onnx", "onnx:qdq")["warnings"]
    assert any("14 linears have scales below 0" in w and "TensorRT" in w for w in said["falling"])
    assert any("session.x64quantprecision" in w for w in said["w8a8"])
    assert export(str(golden), tmp_path / "golden-onnx", "onnx:qdq")["warnings"] == []
