"""The run on tiny checkpoints: what is written is what was solved, whole, and the same every time."""

import hashlib
import json
import re
import shutil
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

import llmq
from llmq import calibration
from llmq.algorithms import _sweep, _walk
from llmq.algorithms.qep import Qep
from llmq.checkpoint import Sink, Source
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.evaluation.scores import evaluate
from llmq.evaluation.windows import find_convention
from llmq.model.pretrained import blank_model, model_config
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.runtime.linear import QuantLinear
from llmq.stats import Drift, Hessian
from llmq.types import LlmqError
from llmq_kernels import panel

IDS = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))
BASE = {"samples": 8, "seq_len": 32, "group_size": 32, "dtype": "float32"}


@pytest.fixture
def text(tmp_path, prose):
    file = tmp_path / "calibration.txt"
    file.write_text(prose(2000))
    return str(file)


def job(folder, out, **options):
    return quantize(prepare(str(folder), Recipe(**(BASE | options)), "cpu"), out)


def decoded(out):
    """Return every quantized weight of a checkpoint, float32, through the format's own reader."""
    source = Source(out)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    return {name: packed.qtensor(name).dequantize() for name in packed.linears}


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"method": "rtn", "format": "gptq"}, "gptq"),
        ({"method": "gptq", "format": "gptq"}, "gptq"),
        ({"method": "gptq:desc_act=true", "format": "gptq"}, "gptq"),
        ({"method": "gptq", "format": "gptq", "sym": False}, "gptq"),
        ({"method": "gptq", "format": "gptq", "bits": 8, "group_size": "channel"}, "gptq"),
        ({"method": "qep:share=0.5,gptq,descent:rounds=1", "format": "gptq", "bits": 3, "range": "mse"}, "gptq"),
        ({"method": "qep,gptq,descent,signround:steps=2", "format": "awq", "range": "mse"}, "awq"),
        ({"method": "awq,rtn", "format": "awq", "sym": False}, "awq"),
        ({"method": "awq,gptq", "format": "awq", "range": "mse"}, "awq"),
        ({"method": "gptq", "bits": 3, "format": "compressed-tensors", "sym": False}, "compressed-tensors"),
        ({"method": "smoothquant,rtn", "bits": 8, "act_bits": 8, "group_size": None}, "compressed-tensors"),
        ({"method": "migrate,rtn", "bits": 8, "act_bits": 8, "group_size": None}, "compressed-tensors"),
        ({"method": "rtn", "bits": 8, "act_bits": 8, "act_sym": False, "group_size": None}, "compressed-tensors"),
        (
            {"method": "smoothquant,gptq", "bits": 8, "act_bits": 8, "act": "tensor", "group_size": None},
            "compressed-tensors",
        ),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else v,
)
def test_writes_a_checkpoint_that_loads_and_answers_like_its_decoded_weights(
    tiny_checkpoint, tmp_path, text, options, method
):
    folder = tiny_checkpoint(tie_word_embeddings=True)
    out = tmp_path / "out"
    summary = job(folder, out, calib=text, **options)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert len(summary["linears"]) == 14 and not list(out.glob("part-*")) and not (tmp_path / "out.partial").exists()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = Source(out)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name in source:
                p.copy_(source.get(name))  # norms, which a transform may have changed
        for name, W_NK in decoded(out).items():
            reference.get_submodule(name).weight.copy_(W_NK)
        loaded = llmq.load(out, dtype=torch.float32)
        plain, fast = (m(IDS).logits for m in (llmq.load(out, dtype=torch.float32, backend="reference"), loaded))
        want = reference(IDS).logits
    if options.get("act_bits"):
        assert (fast - want).norm() / want.norm() < 0.2  # the activations are rounded too
        assert not torch.equal(fast, want)
    else:
        torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-4)
        halves = {"int4pack", "int8pack"} & {m.backend for m in loaded.modules() if isinstance(m, QuantLinear)}
        assert (fast - want).norm() / want.norm() < (2e-2 if halves else 1e-3)  # torch's products round to bfloat16


def test_static_scales_by_entropy_are_level_with_minmax_after_a_relu(tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint(hidden_act="relu")
    ids = calibration.tokens(text, AutoTokenizer.from_pretrained(folder), 16, 32, seed=5)
    with torch.no_grad():
        want = llmq.load(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)
    kl = {}
    for range_ in ("minmax", "mse", "entropy"):
        static = {"bits": 8, "act_bits": 8, "act": "tensor", "act_range": range_, "group_size": "channel"}
        job(folder, tmp_path / range_, calib=text, method="rtn", samples=32, **(static))
        source = Source(tmp_path / range_)
        assert all(source.get(n) > 0 for n in source.names() if n.endswith("input_scale"))
        with torch.no_grad():
            got = llmq.load(tmp_path / range_, dtype=torch.float32, backend="reference")(ids).logits.log_softmax(-1)
        kl[range_] = (want.exp() * (want - got)).sum(-1).mean().item()
    assert kl["entropy"] < 1.5 * kl["minmax"], kl


def test_out_holds_what_a_runtime_wants(tiny_checkpoint, tmp_path, text):
    folder, out = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out"
    (folder / "preprocessor_config.json").write_text("{}")
    job(folder, out, calib=text, skip=("layers.0.self_attn.v_proj",), format="compressed-tensors")
    names = {p.name for p in out.iterdir()}
    copied = {p.name for p in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert copied <= names
    assert {"config.json", "model.safetensors", "quantization.json", "recipe.yaml", "README.md"} <= names
    source, before = Source(out), Source(folder)
    kept = [
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    assert all(torch.equal(source.get(n), before.get(n)) for n in kept)
    card = (out / "README.md").read_text()
    assert "method: qep,gptq,descent" in card and "bits per quantized weight" in card
    line = json.loads((out / "quantization.json").read_text())["linears"]["model.layers.1.mlp.down_proj"]
    assert line["method"] == "qep,gptq,descent" and 0 <= line["qep_alpha"] <= 1 and 0 < line["descent"] < 1
    assert line["damp"] == 0.01 and line["tokens"] == 256 and 0 < line["output_error"] < 1


@pytest.mark.parametrize("method", ["gptq", "awq,gptq"])
def test_same_seed_and_recipe_give_identical_bytes(tiny_checkpoint, tmp_path, text, method):
    folder, digests = tiny_checkpoint(), []
    for name in ("a", "b"):
        job(folder, tmp_path / name, calib=text, method=method)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]
    job(folder, tmp_path / "c", calib=text, method=method, seed=1)
    assert (
        digests[0]["model.safetensors"] != hashlib.sha256((tmp_path / "c/model.safetensors").read_bytes()).hexdigest()
    )


def test_the_written_recipe_repeats_the_run(tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint()
    job(
        folder,
        tmp_path / "a",
        calib=text,
        method="awq,rtn",
        override=("down_proj:bits=8",),
        format="compressed-tensors",
    )
    again = Recipe.load(tmp_path / "a/recipe.yaml", {})
    quantize(prepare(str(folder), again, "cpu"), tmp_path / "b")
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_calibration_leaves_out_is_told_and_recorded(tiny_checkpoint, tmp_path, prose):
    rows = [{"text": prose(300), "id": i} for i in range(9)] + [{"text": ""}, {"prompt": "unread"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for budget in ({}, {"target_bpw": 5.0, "format": "compressed-tensors"}):  # a budget is planned twice
        out = tmp_path / f"out{len(budget)}"
        summary = job(tiny_checkpoint(), out, calib=str(tmp_path / "rows.jsonl"), method="gptq", **budget)
        said = [w for w in summary["warnings"] if "calibration text" in w]
        assert [w.partition("jsonl: ")[2] for w in said] == [
            "left out of 11 rows: 1 empty, 1 without text or chat", "not read of its 11 rows: id (9), prompt (1)"
        ]  # fmt: skip
        assert json.loads((out / "quantization.json").read_text())["warnings"] == summary["warnings"]


def test_options_of_calibration_that_a_method_ignores_are_told_and_not_recorded(tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint()
    plain = prepare(str(folder), Recipe(method="rtn", group_size=32), "cpu")
    assert not [w for w in plain.warnings if "calibration" in w]
    told = prepare(str(folder), Recipe(method="rtn", group_size=32, calib=text, varied=0.5, seq_len=16), "cpu")
    assert told.warnings == [
        *plain.warnings,
        "--calib, --varied, --seq-len: method rtn reads no calibration text, they change nothing",
    ]
    assert told.method.recipe == plain.method.recipe and told.method.recipe.calib is None
    assert prepare(str(folder), Recipe(method="gptq", group_size=32, calib=text), "cpu").method.recipe.samples == 128


def test_one_solve_gives_identical_codes_in_every_format(tiny_checkpoint, tmp_path, text):
    folder, weights = tiny_checkpoint(dtype=torch.float16), []
    for fmt in ("gptq", "gptq:checkpoint_format=gptq_v2", "awq", "compressed-tensors"):
        out = tmp_path / re.sub(r"\W", "_", fmt)
        job(folder, out, calib=text, format=fmt)
        weights.append(decoded(out))
    assert len(weights[0]) == 14
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[n], w) for n, w in weights[0].items())


def test_sharded_sources_give_the_same_weights(tiny_checkpoint, tmp_path, text):
    job(tiny_checkpoint(), tmp_path / "a", calib=text)
    job(tiny_checkpoint(shard="50KB"), tmp_path / "b", calib=text)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_gptq_loses_less_than_rtn_and_awq_less_too(tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint()
    float_model = llmq.load(folder)
    ids = calibration.tokens(text, AutoTokenizer.from_pretrained(folder), 32, 32, seed=5)

    def kl(method, **options):
        out = tmp_path / method.replace(",", "_")
        job(folder, out, calib=text, method=method, bits=3, format="compressed-tensors", samples=100, **options)
        with torch.no_grad():
            p, q = (m(ids).logits.log_softmax(-1) for m in (float_model, llmq.load(out)))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    rtn = kl("rtn")
    assert kl("gptq") < 0.8 * rtn
    assert kl("awq,rtn") < rtn


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_quantized_head_unties_the_embedding(tiny_checkpoint, tmp_path, text, tied, method):
    folder, out = tiny_checkpoint(tie_word_embeddings=tied), tmp_path / "out"
    summary = job(folder, out, calib=text, method=method, lm_head=True, format="compressed-tensors")
    assert "lm_head" in summary["linears"]
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = llmq.load(out, dtype=torch.float32)
    assert type(model.lm_head).__name__ == "QuantLinear"
    with torch.no_grad():
        float_logits = llmq.load(folder, dtype=torch.float32)(IDS).logits
        assert (model(IDS).logits - float_logits).norm() / float_logits.norm() < 0.5


@pytest.mark.parametrize(
    "config",
    [MistralConfig, Qwen2Config, Qwen3Config, Phi3Config],
    ids=lambda c: c.model_type,
)
def test_other_architectures(config, tokenizer_bos, tmp_path, text):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    folder = tmp_path / "float"
    AutoModelForCausalLM.from_config(config(**sizes), dtype=torch.float32).save_pretrained(folder)
    tokenizer_bos.save_pretrained(folder)
    job(folder, tmp_path / "g", calib=text, bits=8)
    with torch.no_grad():
        a, b = (llmq.load(f, dtype=torch.float32)(IDS).logits for f in (folder, tmp_path / "g"))
    assert (a - b).norm() / a.norm() < 0.02


@pytest.mark.parametrize(("share", "batches"), [(0.25, 2), (0.3, 3), (1.0, 8)])
def test_share_of_the_calibration_runs_through_the_float_model(
    tiny_checkpoint, tmp_path, text, monkeypatch, share, batches
):
    seen, correct = set(), Qep.correct

    def watched(self, W_NK, sums, stats):
        seen.add((stats[Drift].number("count"), stats[Hessian].count))
        return correct(self, W_NK, sums, stats)

    monkeypatch.setattr(Qep, "correct", watched)
    monkeypatch.setattr("llmq.pipeline.entering.BATCH_TOKENS", 32)
    job(tiny_checkpoint(), tmp_path / "out", calib=text, method=f"qep:share={share},gptq")
    assert seen == {(32 * batches, 32 * 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_activation_scales_are_those_of_the_inputs_seen(tiny_checkpoint, tmp_path, text, dtype):
    folder, out = tiny_checkpoint(dtype=dtype), tmp_path / "out"
    options = {"method": "rtn", "bits": 8, "act_bits": 8, "act": "tensor", "act_range": "minmax", "group_size": None}
    job(folder, out, calib=text, **options)
    largest, model = {}, llmq.load(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _m, args, n=name: largest.update({n: args[0].abs().max()}))
    with torch.no_grad():
        model(calibration.tokens(text, llmq.load_tokenizer(folder), 8, 32, seed=0))
    source = Source(out)
    for name, top in largest.items():
        first = name.startswith("model.layers.0.self_attn") and "o_proj" not in name  # nothing before it is rounded
        scale = source.get(f"{name}.input_scale").float().squeeze()
        torch.testing.assert_close(scale, top / 127.5, rtol=2**-8 if first else 0.05, atol=0)


def test_overrides_and_skips_reach_the_file(tiny_checkpoint, tmp_path, text):
    out = tmp_path / "out"
    options = {
        "override": ("down_proj:bits=8,group_size=64",),
        "skip": (r"layers\.0\.",),
        "format": "compressed-tensors",
    }
    summary = job(tiny_checkpoint(), out, calib=text, **options)
    assert {n: v["bits"] for n, v in summary["linears"].items() if "down" in n} == {"model.layers.1.mlp.down_proj": 8}
    assert all(n.startswith("model.layers.1.") for n in summary["linears"])
    types = {n: type(m).__name__ for n, m in llmq.load(out).named_modules() if n.endswith("_proj")}
    assert all((t == "QuantLinear") == n.startswith("model.layers.1.") for n, t in types.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 128}, r"128 .*K ?= ?64"),
        ({"bits": 3, "format": "awq"}, "model.layers.0.*4"),
        ({"sym": False, "format": "gptq:checkpoint_format=gptq"}, "gptq_v2"),
        ({"method": "gptq:desc_act=true", "format": "awq"}, "g_idx"),
        ({"method": "awq"}, "awq,gptq"),
        ({"method": "gptq,rtn"}, "cannot follow a solver"),
        ({"skip": ("nothing_like_it",)}, "matches no linear"),
        ({"skip": ("(",)}, "regular expression"),
        ({"override": ("down_proj",)}, "does not read"),
        ({"override": ("down_proj:bits=many",)}, "from 2 to 8, not 'many'"),
        ({"skip": (".",)}, "every linear is skipped; nothing is left to quantize"),
        ({"calib": "absent.txt"}, "absent.txt"),
        ({"samples": 10_000}, "10000 samples"),
        ({"method": "rtn", "range": "output", "group_size": "tensor", "format": "compressed-tensors"}, "output"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(tiny_checkpoint, tmp_path, text, options, message):
    folder, out = tiny_checkpoint(), tmp_path / "out"
    with pytest.raises(LlmqError, match=message) as error:
        job(folder, out, **({"calib": text} | options))
    assert "\n" not in str(error.value)
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_a_disk_that_is_too_small_is_refused_before_any_work(tiny_checkpoint, tmp_path, text, monkeypatch):
    steps = prepare(str(tiny_checkpoint()), Recipe(**BASE, calib=text), "cpu")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("llmq.checkpoint.sink.shutil.disk_usage", lambda _: usage._replace(free=2 * steps.bytes() - 1))
    with pytest.raises(LlmqError, match="make room"):
        quantize(steps, tmp_path / "out")
    monkeypatch.undo()
    summary = quantize(steps, tmp_path / "out")
    assert summary["size"]["bytes"] == steps.bytes()


@pytest.mark.parametrize("method", ["rtn", "gptq", "migrate,rtn"])
@pytest.mark.parametrize(
    ("kv", "entry", "reach"), [("tensor", "fp8", 448), ("head", "fp8", 448), ("head", "int8", 127.5)]
)
def test_static_scales_of_the_cache_are_those_of_the_quantized_model(
    kv, method, entry, reach, tiny_checkpoint, prose, tmp_path
):
    from transformers import DynamicCache

    from llmq.integrations.cache import static_scales

    src, out, text = tiny_checkpoint(), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(prose(800))
    options = {"method": method, "bits": 8, "group_size": 32, "kv_bits": 8, "kv": kv, "calib": str(text)}
    options |= {"kv_dtype": entry, "samples": 4, "seq_len": 64}
    plan = prepare(str(src), Recipe.load(None, options), "cpu")
    assert any("vLLM" in w and "--kv-dtype fp8" in w for w in plan.warnings) == (entry == "int8")
    quantize(plan, out)
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["strategy"], scheme["num_bits"]) == ({"tensor": "tensor", "head": "attn_head"}[kv], 8)
    assert scheme["type"] == {"fp8": "float", "int8": "int"}[entry]
    model = llmq.load(out, device="cpu", backend="reference")
    scales = static_scales(model)
    tokens = calibration.tokens(str(text), llmq.load_tokenizer(src), 4, 64, 0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    for i, layer in enumerate(cache.layers):
        for scale, states in zip(scales[i], (layer.keys, layer.values), strict=True):
            top = states.abs().amax((0, 2, 3))
            want = top[:, None, None] if kv == "head" else top.max()[None]
            torch.testing.assert_close(scale, want / reach, rtol=1e-3, atol=0)
    got = evaluate(model, llmq.load_tokenizer(src), prose(400), find_convention("gptq", 128), model, 1, kv_bits=8)
    assert 0 < got.kl_mean < 0.02


def test_scales_of_the_cache_need_a_format_that_holds_them(tiny_checkpoint):
    with pytest.raises(LlmqError, match="compressed-tensors"):
        prepare(str(tiny_checkpoint()), Recipe.load(None, {"method": "rtn", "kv_bits": 8, "format": "gptq"}), "cpu")
    with pytest.raises(LlmqError, match="gguf holds no scales"):
        Recipe(kv_bits=8, format="gguf")
    with pytest.raises(LlmqError, match="--kv-bits takes 8"):
        Recipe(kv_bits=4)


@pytest.fixture
def aside(monkeypatch):
    """Let a run on the CPU read ahead and write behind, as one on a GPU does."""
    monkeypatch.setattr(llmq.aside, "pays", lambda device: True)


def test_a_run_that_reads_ahead_and_writes_behind_writes_the_same_bytes(tiny_checkpoint, tmp_path, text, request):
    folder = tiny_checkpoint(dtype=torch.bfloat16)
    job(folder, tmp_path / "a", calib=text)
    request.getfixturevalue("aside")
    job(folder, tmp_path / "b", calib=text)
    a, b = ((tmp_path / out / "model.safetensors").read_bytes() for out in "ab")
    assert a == b


def test_a_run_by_the_kernels_for_gpus_finds_what_the_compiled_loops_do(tiny_checkpoint, tmp_path, text, monkeypatch):
    """By their references on the CPU; sums in another order turn a tie now and then, and feedback others after it."""
    folder = tiny_checkpoint(dtype=torch.bfloat16)
    how = {"calib": text, "method": "qep,gptq,descent:rounds=2", "sym": False, "range": "mse"}
    job(folder, tmp_path / "a", **how)
    launches = []
    for module, name in ((_sweep, "round_panel"), (_walk, "walk_panel")):
        kernel = getattr(panel, name)
        monkeypatch.setattr(module, "compiled", lambda *_: None)
        monkeypatch.setattr(panel, name, lambda *a, of=kernel, called=name: launches.append(called) or of(*a))
    monkeypatch.setattr(llmq.gpu, "DEVICES", frozenset({"cpu"}))
    job(folder, tmp_path / "b", **how)
    assert set(launches) == {"round_panel", "walk_panel"}
    a, b = (decoded(tmp_path / out) for out in "ab")
    alike = [(a[n] == b[n]).double().mean().item() for n in a]
    assert a.keys() == b.keys() and min(alike) > 0.9 and sum(alike) / len(alike) > 0.98


def test_what_fails_while_it_is_read_ahead_ends_the_run_in_its_own_line(
    tiny_checkpoint, tmp_path, text, aside, monkeypatch
):
    plan = prepare(str(tiny_checkpoint()), Recipe(**BASE, calib=text), "cpu")
    get = Source.get

    def broken(self, name):
        if ".layers.1." in name and threading.current_thread() is not threading.main_thread():
            raise LlmqError(f"{name}: the disk is gone")
        return get(self, name)

    monkeypatch.setattr(Source, "get", broken)
    with pytest.raises(LlmqError, match=r"layers\.1\..*the disk is gone"):
        quantize(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_fails_while_it_is_written_behind_is_told_and_the_same_command_goes_on(
    tiny_checkpoint, tmp_path, text, aside, monkeypatch
):
    folder, how = tiny_checkpoint(num_hidden_layers=4), {"calib": text, "method": "qep,gptq"}
    job(folder, tmp_path / "a", **how)
    add, parts = Sink.add, []

    def full(self, tensors):
        parts.append(threading.current_thread())
        if len(parts) == 3:
            raise LlmqError("cannot write part-00002 (No space left on device)")
        add(self, tensors)

    with monkeypatch.context() as patch, pytest.raises(LlmqError, match="cannot write part-00002") as caught:
        patch.setattr(Sink, "add", full)
        job(folder, tmp_path / "b", **how)
    assert len(parts) == 3 and threading.main_thread() not in parts
    assert "goes on from block 2 of 4" in caught.value.__notes__[0]
    job(folder, tmp_path / "b", **how)
    a, b = ((tmp_path / out / "model.safetensors").read_bytes() for out in "ab")
    assert a == b
