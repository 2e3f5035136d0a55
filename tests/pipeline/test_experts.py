"""Experts from end to end: quantized one by one, written under the checkpoint's names, run packed; few tokens and none.

What is loaded must compute what the float model of transformers computes with the decoded weights in place. More
families: tests/test_families.py.
"""

import json
import re

import pytest
import torch
from _families import FAMILIES
from _tiny import VOCAB, make_prose, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import llmq
from llmq.integrations.transformers import registered
from llmq.model.experts import Experts, in_experts
from llmq.pipeline import solving
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.runtime.linear import QuantLinear
from llmq.types import LlmqError
from llmq.verify import verify

IDS = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))
QUICK = {"group_size": 32, "format": "compressed-tensors", "dtype": "float32", "device": "cpu"}
CALIBRATED = {"samples": 8, "seq_len": 32}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FOUR = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DENSE_FIRST = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
MODELS = {
    "qwen3_moe": FOUR,
    "mixtral": LOCAL,
    "glm4_moe": DENSE_FIRST,
    "granitemoe": LOCAL,
    "gpt_oss": LOCAL | {"sliding_window": 8},
    "llama4_text": LOCAL | {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
}
LAST = {  # what the last block's expert 3 is called on disk
    "mixtral": "block_sparse_moe.experts.3.w2",
    "granitemoe": "block_sparse_moe.experts.3.down_proj",
    "llama4_text": "feed_forward.experts.3.down_proj",
}
OURS_ALONE = ("granitemoe", "gpt_oss")  # fused on disk; vLLM reads llama4's one by one


def make(folder, kind, **changes):
    """Save a tiny random model and its tokenizer; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SIZES | MODELS[kind] | changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, p in model.named_parameters():
            if p.dim() == 3 or "router" in name or "gate.weight" in name or name.endswith("_bias"):
                p.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A text to calibrate on."""
    file = tmp_path_factory.mktemp("prose") / "calibration.txt"
    file.write_text(make_prose(1500))
    return file


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def carrying(folder, packed):
    """Return transformers' own float model with the decoded weights of a packed one in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    fused = {n: m for n, m in packed.named_modules() if isinstance(m, Experts)}
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear) and not name.startswith(tuple(f"{n}." for n in fused)):
            model.get_submodule(name).weight.data = module.unpack().dequantize().float()
    for name, experts in fused.items():
        for parameter, lies in experts.fused.items():
            whole = model.get_parameter(f"{name}.{parameter}").data
            for own, e, place in lies.names():
                if lies.leaf == "weight":
                    rows = whole[e].T if lies.transposed else whole[e]
                    n = len(rows) // len(lies.projections)
                    at = slice(place, None, 2) if lies.interleaved else slice(place * n, (place + 1) * n)
                    linear = experts.get_submodule(own.removesuffix(".weight"))
                    rows[at] = linear.unpack().dequantize().float()
    return model


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe", "granitemoe", "gpt_oss", "llama4_text"])
def test_a_family_is_quantized_written_and_run_packed(kind, tmp_path, prose):
    src, out, said = make(tmp_path / "float", kind), tmp_path / "packed", []
    record = llmq.quantize(src, out, calib=prose, warn=said.append, **QUICK, **CALIBRATED)
    names = load_file(out / "model.safetensors").keys()
    assert f"model.layers.1.{LAST.get(kind, 'mlp.experts.3.down_proj')}.weight_packed" in names
    assert not any(n.endswith((".experts.gate_up_proj", "input_linear.weight")) for n in names)
    assert any("only llmq" in w for w in said) == (kind in OURS_ALONE)
    packed = llmq.load(out, dtype=torch.float32, backend="reference")
    got, want = logits(packed), logits(carrying(src, packed))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert sum(map(len, record["experts"]["layers"].values())) in (4, 8)
    assert verify(out, src).passed
    with registered():
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(record["linears"])
    assert (logits(model) - want).abs().median() <= 0.02 * want.abs().median()  # a token may choose another expert


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_other_formats_and_no_calibration(kind, form, tmp_path):
    src, out = make(tmp_path / "float", kind), tmp_path / "packed"
    llmq.quantize(src, out, method="rtn", warn=str, **QUICK | {"format": form})
    packed = llmq.load(out, dtype=torch.float32, backend="reference")
    want = logits(carrying(src, packed))
    assert (logits(packed) - want).abs().max() <= 1e-4 * want.abs().max()
    packed.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(out / "model.safetensors").keys()
    again = llmq.load(tmp_path / "again", dtype=torch.float32, backend="reference")
    assert torch.equal(logits(again), logits(packed))


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_transformers_own_reader_makes_the_same_model_of_it(kind, tmp_path):
    src, out = make(tmp_path / "float", kind), tmp_path / "packed"
    llmq.quantize(src, out, method="rtn", warn=str, **QUICK)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not any(isinstance(m, QuantLinear) for m in theirs.modules())
    want = logits(llmq.load(out, dtype=torch.float32, backend="reference"))
    assert (logits(theirs) - want).abs().max() <= 1e-4 * want.abs().max()


def test_the_config_names_linears_as_the_model_and_as_the_file_does(tmp_path):
    plan = prepare(str(make(tmp_path / "float", "mixtral")), Recipe(method="rtn", group_size=32, format="gptq"), "cpu")
    listed = plan.config()["modules_in_block_to_quantize"][0]
    assert {"mlp.experts.3.down_proj", "block_sparse_moe.experts.3.w2", "self_attn.q_proj"} <= set(listed)
    assert {r"-:.*\.mlp\.gate$", r"-:.*\.block_sparse_moe\.gate$"} == plan.config()["dynamic"].keys()


def test_a_bare_decoder_runs_packed(tmp_path):
    src, out = make(tmp_path / "float", "mixtral"), tmp_path / "packed"
    llmq.quantize(src, out, method="rtn", **QUICK)
    whole = llmq.load(out, dtype=torch.float32, backend="reference")
    with registered(backend="reference"):
        bare = AutoModel.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(bare(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def starved(folder):
    """Bias the last block's router of a DeepSeek so that expert 3 is never chosen."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][3] = -9.0
    from safetensors.torch import save_file

    save_file(tensors, file, {"format": "pt"})


def test_an_expert_without_tokens_is_rounded_and_named(tmp_path, prose):
    src, out = make(tmp_path / "float", "glm4_moe"), tmp_path / "packed"
    starved(src)
    record = llmq.quantize(src, out, calib=prose, **QUICK, **CALIBRATED)
    plain = llmq.quantize(src, tmp_path / "plain", method="rtn", range="mse", **QUICK)
    experts, name = record["experts"], "model.layers.1.mlp.experts"
    assert experts["none"] == [f"{name}.3"] and experts["layers"][name][3] == 0
    assert sum(experts["layers"][name]) == 2 * 8 * 32 and experts["tokens"]["experts"] == 4
    assert experts["few"] == [f"{name}.{e}" for e, n in enumerate(experts["layers"][name]) if 0 < n < 64]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        lines = [r["linears"][f"{name}.3.{projection}"] for r in (record, plain)]
        assert "no token" in lines[0]["fallback"] and lines[0]["tokens"] == 0 and "output_error" not in lines[0]
        assert lines[0]["sha256"] == lines[1]["sha256"]
    assert record["linears"][f"{name}.1.up_proj"]["tokens"] == experts["layers"][name][1]


@pytest.mark.parametrize("options", [{"method": "awq,gptq"}, {"method": "rtn", "range": "output", "target_bpw": 4.6}])
def test_a_range_that_weighs_by_h_takes_an_expert_without_tokens(options, tmp_path, prose):
    src = make(tmp_path / "float", "glm4_moe")
    starved(src)
    record = llmq.quantize(src, tmp_path / "out", calib=prose, **QUICK, **CALIBRATED, **options)
    line = record["linears"]["model.layers.1.mlp.experts.3.down_proj"]
    assert "no token" in line["fallback"] and line["weight_error"] < 0.08
    assert verify(tmp_path / "out", src).passed


def test_an_expert_without_tokens_has_no_static_scale_and_that_is_said(tmp_path, prose):
    src = make(tmp_path / "float", "glm4_moe")
    starved(src)
    static = QUICK | CALIBRATED | {"method": "rtn", "bits": 8, "act_bits": 8, "act": "tensor", "group_size": "channel"}
    name = r"model\.layers\.1\.mlp\.experts\.3\.gate_proj"
    with pytest.raises(LlmqError, match=f"^{name}: no token .* give more --samples, --experts all or --act token;"):
        llmq.quantize(src, tmp_path / "out", calib=prose, **static)
    assert not (tmp_path / "out").exists()
    llmq.quantize(src, tmp_path / "out", calib=prose, experts="all", overwrite=True, **static)


def test_every_token_calibrates_every_expert_where_that_is_asked_for(tmp_path, prose):
    src = make(tmp_path / "float", "glm4_moe")
    starved(src)
    record = llmq.quantize(src, tmp_path / "out", calib=prose, experts="all", **QUICK, **CALIBRATED)
    name = "model.layers.1.mlp.experts"
    assert record["experts"]["calibrated_on"] == "all tokens" and record["experts"]["none"] == [f"{name}.3"]
    lines = [record["linears"][f"{name}.{e}.{p}"] for e in range(4) for p in ("gate_proj", "up_proj", "down_proj")]
    assert all(line["tokens"] == 8 * 32 and "fallback" not in line for line in lines)
    assert verify(tmp_path / "out", src).passed


@pytest.mark.parametrize("method", ["rtn", "qep,gptq"])
def test_the_weights_of_one_round_of_experts_are_in_memory_at_a_time(method, tmp_path, prose, monkeypatch):
    for module in ("model", "pipeline"):
        monkeypatch.setattr(f"llmq.{module}.experts.ROUND", 2)  # of four experts
    calibrated = {} if method == "rtn" else CALIBRATED | {"calib": str(prose)}
    recipe = Recipe(method=method, group_size=32, format="compressed-tensors", **calibrated)
    plan, there, real = prepare(str(make(tmp_path / "float", "gpt_oss")), recipe, "cpu"), [], solving.solve

    def solve(*args):
        there.append({n for n, m in in_experts(plan.skeleton.blocks).items() if not m.weight.is_meta})
        return real(*args)

    monkeypatch.setattr(solving, "solve", solve)
    quantize(plan, tmp_path / "out", check=False)
    assert len(there) == (32 if method == "rtn" else 20)  # one a linear, or one a site
    assert all(len(names) <= 2 * (method != "rtn") for names in there) and len(set().union(*there)) in (0, 12)


def test_weights_of_tokens_mean_nothing_for_experts_and_that_is_recorded(tmp_path, prose):
    src = make(tmp_path / "float", "glm4_moe")
    record = llmq.quantize(src, tmp_path / "out", calib=prose, method="fisher,gptq", **QUICK, **CALIBRATED)
    weighed = {n for n, line in record["linears"].items() if "weighting" not in line}
    assert weighed == {n for n in record["linears"] if ".experts." not in n}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"override": [r"experts\.3\.:bits=8"]}, "differs from"),
        ({"skip": [r"experts\.3\.down_proj"]}, "1 of its linears stay float"),
    ],
)
def test_experts_of_a_layer_that_are_not_alike_are_refused(options, said, tmp_path):
    src = make(tmp_path / "float", "qwen3_moe")
    with pytest.raises(LlmqError, match=f"experts of a layer are quantized alike.*{said}"):
        llmq.quantize(src, tmp_path / "out", method="rtn", **QUICK, **options)
    assert not (tmp_path / "out").exists()


def with_decoded(folder, packed):
    """Return transformers' own float model with the decoded weights of a packed one whose experts stay as they are."""
    float_ = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            float_.get_submodule(name).weight.data = module.unpack().dequantize().float()
    return float_


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "llama4_text"])
def test_experts_that_stay_float_lie_as_transformers_reads_them(kind, tmp_path, prose):
    src, out, said = make(tmp_path / "float", kind), tmp_path / "out", []
    llmq.quantize(src, out, calib=prose, skip=["experts"], warn=said.append, **QUICK, **CALIBRATED)
    assert not any("one by one" in w for w in said)
    old, new = (load_file(f / "model.safetensors") for f in (src, out))
    whole = {n for n, t in old.items() if t.dim() == 3 or ".experts." in n}
    apart = kind == "llama4_text"  # which transformers takes apart in any compressed-tensors model
    assert len(whole) >= 2 and any(".experts.0." in n for n in new) == apart
    assert apart or all(torch.equal(old[n], new[n]) for n in whole)
    packed = llmq.load(out, dtype=torch.float32, backend="reference")
    want = logits(with_decoded(src, packed))
    assert (logits(packed) - want).abs().max() <= 1e-4 * want.abs().max()
    assert verify(out, src).passed
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # transformers' own reader
    assert not any(isinstance(m, QuantLinear) for m in theirs.modules())
    assert (logits(theirs) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_vl_moe"])
def test_of_two_layers_one_may_keep_its_experts(kind, tmp_path):
    src, out = tmp_path / "float", tmp_path / "out"
    if kind in MODELS:
        make(src, kind)
    else:
        FAMILIES[kind].save(src)  # whose file has every matrix the other way round
    llmq.quantize(src, out, method="rtn", skip=[r"layers\.0\.mlp\.experts"], warn=str, **QUICK)
    old, new = (load_file(f / "model.safetensors") for f in (src, out))
    kept = [n for n in old if re.search(r"layers\.0\.mlp\.experts", n)]
    assert len(kept) >= 2 and all(torch.equal(old[n], new[n]) for n in kept)
    packed = llmq.load(out, dtype=torch.float32, backend="reference")
    llmq.dequantize(out, tmp_path / "again", dtype="float32", warn=str)
    float_ = llmq.load(tmp_path / "again", dtype=torch.float32)
    want = logits(float_)
    assert (logits(packed) - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_budget_gives_the_experts_of_a_layer_one_choice(tmp_path, prose):
    src = make(tmp_path / "float", "qwen3_moe")
    record = llmq.quantize(
        src, tmp_path / "out", calib=prose, method="rtn", target_bpw=5.0, bit_choices="3,4,8", **QUICK, **CALIBRATED
    )
    for i in range(2):
        bits = {line["bits"] for n, line in record["linears"].items() if f"layers.{i}.mlp.experts" in n}
        assert len(bits) == 1
    assert len({line["bits"] for line in record["linears"].values()}) > 1


def test_the_option_means_nothing_without_experts(tiny_checkpoint, tmp_path):
    with pytest.raises(LlmqError, match="--experts means nothing here"):
        llmq.quantize(tiny_checkpoint(), tmp_path / "out", method="rtn", experts="all", group_size=32)
    with pytest.raises(LlmqError, match="--experts all means nothing here: the router"):
        prepare(str(make(tmp_path / "float", "llama4_text")), Recipe(method="rtn", experts="all", group_size=32))
    assert "experts" not in Recipe().resolved().to_json() and json.dumps(Recipe(experts="all").to_json())


def test_more_experts_a_token_than_there_are_is_refused_before_any_work(tmp_path):
    folder = tmp_path / "m"
    FAMILIES["qwen3_moe"].save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(LlmqError, match=r"config\.json: a token is sent to 9 experts of \d; correct it"):
        prepare(str(folder), Recipe(method="rtn", group_size=32), "cpu")
