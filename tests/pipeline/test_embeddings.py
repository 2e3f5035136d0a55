"""`--embeddings`: what is written of an embedding and a head, who reads it, what it computes."""

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import llmq
from llmq.checkpoint import Source
from llmq.checkpoint.decoding import as_floats
from llmq.evaluation.streamed import Streamed
from llmq.pipeline.plan import outline, prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.runtime.embedding import QuantEmbedding, TiedHead
from llmq.types import LlmqError
from llmq.verify import verify

IDS = torch.arange(24)[None] + 3
TABLE = "model.embed_tokens"
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def recipe(**options):
    return Recipe(**({"method": "rtn", "group_size": 32, "dtype": "float32", "embeddings": 8} | options))


@pytest.fixture
def source(tiny_checkpoint):
    """`source(kind)`: a float model whose head is its own ("untied") or the embedding ("tied"; "gemma" scales it)."""

    def make(kind):
        folder = tiny_checkpoint(tie_word_embeddings=kind != "untied", num_hidden_layers=1)
        if kind == "gemma":
            vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
            config = Gemma3TextConfig(**TINY, vocab_size=vocab, head_dim=16, num_key_value_heads=2)
            Gemma3ForCausalLM(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def logits():
    def of(model):
        with torch.no_grad():
            return model(IDS).logits

    return of


@pytest.mark.parametrize("kind", ["untied", "tied", "gemma"])
def test_a_packed_embedding_computes_what_it_decodes_to(kind, source, tmp_path, logits):
    folder, out = source(kind), tmp_path / "out"
    record = quantize(prepare(str(folder), recipe(), "cpu"), out)
    rounded = {TABLE, "lm_head"} if kind == "untied" else {TABLE}
    assert {n for n, line in record["linears"].items() if line["bits"] == 8} == rounded
    assert all(record["linears"][n]["weight_error"] < 1e-4 for n in rounded)
    assert Source(out).config["tie_word_embeddings"] == (kind != "untied")

    decoded = Source(out)
    as_floats(decoded, torch.float32)
    floats = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    floats.load_state_dict({n: decoded.get(n) for n in decoded.names()}, strict=False)
    model = llmq.load(out, dtype=torch.float32, backend="reference")
    assert torch.equal(logits(model), logits(floats))

    fast = llmq.load(out, dtype=torch.float32)
    assert (logits(fast) - logits(model)).norm() < 0.02 * logits(model).norm()
    if kind != "untied":
        assert isinstance(fast.lm_head, TiedHead) and fast.lm_head.prepacked is not None
    scored = Streamed(out, "it", dtype=torch.float32)
    for states in scored.each([IDS[0].tolist()]):
        assert torch.equal(scored.log_probs(states), logits(fast)[0].log_softmax(-1))
    fast.save_pretrained(tmp_path / "saved")
    old, new = load_file(out / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    assert logits(fast.to(torch.bfloat16)).dtype == torch.bfloat16
    assert verify(out, folder).passed


def test_only_the_rows_that_are_looked_up_are_decoded(source, tmp_path, monkeypatch):
    quantize(prepare(str(source("tied")), recipe(embeddings="int:bits=4:group=32"), "cpu"), tmp_path / "out")
    table = llmq.load(tmp_path / "out", dtype=torch.float32).get_input_embeddings()
    whole, seen, unpack = table.dequantize(), [], table.fmt.unpack
    monkeypatch.setattr(table.fmt, "unpack", lambda tensors, spec: seen.append(spec.N) or unpack(tensors, spec))
    ids = torch.tensor([[5, 9, 5]])
    assert isinstance(table, QuantEmbedding) and torch.equal(table(ids), whole[ids]) and seen == [3]


def test_the_library_matches_and_decodes_it_and_transformers_computes_it(source, tmp_path, logits, monkeypatch):
    """transformers itself stops before it reads a weight; past that it computes what we do."""
    out = tmp_path / "out"
    quantize(prepare(str(source("untied")), recipe(), "cpu"), out)
    config = QuantizationConfig.model_validate(Source(out).quantization)
    embedding = torch.nn.Embedding(2, 2)
    found = [g for g in config.config_groups.values() if any(is_match(TABLE, embedding, t) for t in g.targets)]
    assert [g.weights.num_bits for g in found] == [8] and "Linear" in config.config_groups["group_0"].targets
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    init = PreTrainedModel._init_weights

    def guarded(self, module):
        if not isinstance(module, torch.nn.Embedding):
            init(self, module)

    monkeypatch.setattr(PreTrainedModel, "_init_weights", guarded)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(llmq.load(out, dtype=torch.float32, backend="reference")))


@pytest.mark.parametrize(
    ("kind", "options", "takes"),
    [
        ("untied", {}, True),
        ("untied", {"embeddings": "int:bits=4:group=32"}, True),
        ("untied", {"embeddings": 6}, False),
        ("tied", {}, False),
        ("tied", {"lm_head": True}, True),
    ],
)
def test_who_reads_it(kind, options, takes, source):
    plan = outline(str(source(kind)), recipe(**options), "cpu")
    rows = {r.runtime: r for r in plan.readers()}
    assert rows["vLLM"].accepts is takes and rows["vLLM"].known == "source"
    assert not rows["transformers"].accepts and not rows["SGLang"].accepts
    assert plan.bytes() > 0 and plan.method.format.__class__.__name__ == "CompressedTensors"


def test_a_head_that_is_asked_for_is_solved_and_the_embedding_beside_it_rounded(source, tmp_path):
    record = quantize(prepare(str(source("tied")), recipe(lm_head=True), "cpu"), tmp_path / "out")
    assert {n: record["linears"][n]["bits"] for n in (TABLE, "lm_head")} == {TABLE: 8, "lm_head": 4}
    assert not Source(tmp_path / "out").config["tie_word_embeddings"]


def test_other_embeddings_are_left_float_by_name(tiny_checkpoint, tokenizer_bos, tmp_path):
    config = OPTConfig(
        vocab_size=len(tokenizer_bos), hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer_bos.save_pretrained(tmp_path / "opt")
    said = outline(str(tmp_path / "opt"), recipe(), "cpu").config()
    assert said["ignore"] == ["lm_head", "model.decoder.embed_positions"]
    assert [g["targets"] for g in said["config_groups"].values()] == [["Linear"], ["Embedding"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "gptq"}, "format gptq holds no quantized embeddings"),
        ({"embeddings": "fp8"}, "an embedding is symmetric integers with scales per row or group, not Fp8 per channel"),
        ({"embeddings": "int:bits=8:group=32:asym"}, "an embedding is symmetric integers"),
        ({"embeddings": 9}, "option bits takes a whole number from 2 to 8"),
    ],
)
def test_what_no_embedding_can_be(options, said, source):
    with pytest.raises(LlmqError, match=said):
        outline(str(source("tied")), recipe(**options), "cpu")


def test_of_gguf_it_is_the_type_of_embedding_and_head(source):
    options = {"format": "gguf", "group_size": None, "embeddings": "q8_0", "type": "Q4_0"}
    plan = outline(str(source("untied")), recipe(**options), "cpu")
    kinds = {n: s.scheme.weight.kind for n, s in plan.matrices.items()}
    assert kinds[TABLE] == kinds["lm_head"] == "Q8_0" and set(kinds.values()) == {"Q8_0", "Q4_0"}
    with pytest.raises(LlmqError, match="--embeddings '8' is no ggml type"):
        outline(str(source("untied")), recipe(**options | {"embeddings": 8}), "cpu")


def test_a_budget_leaves_it_alone(source):
    plan = outline(str(source("untied")), recipe(target_bpw=5.0), "cpu")
    assert {s.scheme.weight.bits for s in plan.possible() if s.name == TABLE} == {8}
