"""What is known before any work: what every matrix becomes, and weights that no scale of the format can hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from _families import FAMILIES
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

import llmq
from llmq.checkpoint import Source
from llmq.pipeline.plan import outline, prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.registry import find
from llmq.types import LlmqError, Scheme

NAME = "model.layers.1.mlp.up_proj"
RTN = {"method": "rtn", "group_size": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def faint(tiny_checkpoint):
    """`faint(dtype)`: a checkpoint with four rows of a linear near 1e-7, and one row of zeros."""

    def make(dtype):
        folder = tiny_checkpoint(dtype=dtype)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{NAME}.weight"][:4] *= 1e-6
        tensors[f"{NAME}.weight"][4] = 0
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def told(folder, **options):
    return [w for w in prepare(str(folder), Recipe(**options), "cpu").warnings if "too small or too large" in w]


@pytest.mark.parametrize("form", ["gptq", "awq", "gguf:pre=gpt-2"])
def test_weights_below_float16_scales_are_warned_of(form, faint):
    options = {"method": "rtn", "format": form, "type": "Q8_0"} if form.startswith("gguf") else RTN | {"format": form}
    (warning,) = told(faint(torch.float32), **options)
    assert warning.startswith(f"{NAME}: the weights of 8 groups ") and "compressed-tensors" in warning


def test_scales_as_wide_as_the_checkpoint_hold_them(faint, tmp_path):
    folder = faint(torch.float32)
    options = RTN | {"format": "compressed-tensors"}
    assert told(folder, **options) == []
    quantize(prepare(str(folder), Recipe(**options), "cpu"), tmp_path / "out")
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight_scale"]
    W = load_file(folder / "model.safetensors")[f"{NAME}.weight"]
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale[:4] * 7.5, W[:4].view(4, -1, 32).abs().amax(-1), rtol=1e-5, atol=0)
    (warning,) = told(faint(torch.float16), **options)  # whose own scales are float16
    assert "8 groups" in warning


def test_ordinary_weights_are_not_warned_of(tiny_checkpoint):
    assert told(tiny_checkpoint(dtype=torch.bfloat16), **RTN) == []


HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@pytest.mark.parametrize(
    ("options", "outside"),
    [
        (RTN, set()),
        (RTN | {"lm_head": True}, {HEAD}),
        ({"method": "rtn", "format": "gguf", "type": "Q8_0"}, {HEAD, EMBEDDING}),
        ({"method": "rtn", "format": "gguf", "type": "Q8_0", "skip": ("^output",)}, {EMBEDDING}),
    ],
    ids=["folder", "folder and head", "gguf", "gguf and skip"],
)
def test_a_format_sees_every_matrix_that_it_will_hold(tiny_checkpoint, monkeypatch, options, outside):
    form = find("formats", options.get("format", "gptq"))
    seen, check = [], form.check
    monkeypatch.setattr(form, "check", lambda self, linears, skipped: seen.extend(linears) or check(self, linears))
    plan = prepare(str(tiny_checkpoint()), Recipe(**options), "cpu")
    inside = {n for n, _ in plan.skeleton.linears()}
    assert {s.name for s in seen} == inside | outside == {*plan.matrices} and plan.linears | plan.rows == plan.matrices
    assert (plan.head == HEAD) == bool(options.get("lm_head")) and {*plan.rows} == outside - {plan.head}
    assert all((s.N, s.K) == (320, 64) for s in seen if s.name in outside)


def test_other_schemes_give_another_plan_and_read_nothing(tiny_checkpoint, monkeypatch):
    plan = prepare(str(tiny_checkpoint()), Recipe(**RTN, format="compressed-tensors", seed=1), "cpu")
    monkeypatch.setattr(Source, "get", None)
    three = Scheme(plan.linears[NAME].scheme.weight.with_bits(3))
    other = plan.settled({NAME: three}, dataclasses.replace(plan.method.recipe, bits=3))
    bits = {n: s.scheme.weight.bits for n, s in other.linears.items()}
    assert bits.pop(NAME) == 3 and set(bits.values()) == {4} and plan.linears[NAME].scheme.weight.bits == 4
    assert other.method.recipe.bits == 3 and other.warnings[-1:] == plan.warnings != []
    assert any("weights of 3 bits" in w for w in other.warnings)
    assert other.bytes() < plan.bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "rtn,signround", "format": "gguf", "type": "F16"},
            "signround tunes integers and small floats only",
        ),
        ({"method": "gptq:desc_act=true", "format": "awq"}, "format awq holds no g_idx"),
        ({"method": "rtn", "kv_bits": 8, "format": "gptq"}, "format gptq holds no scales of a key-value cache"),
        ({"method": "rtn", "format": "gguf:mix=Q8_0"}, "gguf has no option 'mix'"),
    ],
)
def test_what_a_format_is_not_for_is_refused(tiny_checkpoint, options, message):
    with pytest.raises(LlmqError, match=message):
        prepare(str(tiny_checkpoint()), Recipe(**options), "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn,signround", "group_size": "tensor"}, "signround moves the scale of every row.*channel"),
        ({"method": "gptq,distill", "bits": 2, "group_size": "tensor"}, "distill moves the scale of every row"),
        ({"method": "rtn,signround", "samples": 1}, "signround judges by sequences .* at least 2 --samples"),
        ({"bits": 8, "act_bits": 8, "override": ("down_proj:bits=4",)}, "down_proj: 8-bit activations need 8-bit"),
    ],
)
def test_what_cannot_be_tuned_or_run_is_refused_before_any_work(tiny_checkpoint, options, message):
    form = {"format": "compressed-tensors", "method": "rtn"}
    with pytest.raises(LlmqError, match=message):
        prepare(str(tiny_checkpoint()), Recipe(**(form | options)), "cpu")


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ("nope.txt", r"^no calibration text at nope\.txt: give a file"),
        ("nope.txt,varied", r"^--calib nope\.txt \(4 of 8 samples\): no calibration text at nope\.txt"),
        ("model.pdf", r"model\.pdf: calibration text must be one of \.txt"),
        (".", "holds no .txt, .jsonl"),
    ],
)
def test_calibration_text_that_is_not_there_is_refused_before_any_work(
    tiny_checkpoint, tmp_path, monkeypatch, calib, message
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Path("model.pdf").write_text("")
    given = {"method": "gptq", "group_size": 32, "calib": tuple(calib.split(",")), "samples": 8, "device": "cpu"}
    with pytest.raises(LlmqError, match=message):
        llmq.plan(tiny_checkpoint(), **given)
    with pytest.raises(LlmqError, match=message):
        llmq.quantize(tiny_checkpoint(), tmp_path / "out", **given)


def test_sequences_are_no_longer_than_the_model_reads(tiny_checkpoint, tmp_path):
    src, said = str(tiny_checkpoint()), "--seq-len 600 is longer than the 512 tokens that the model reads at once"
    of = {"method": "gptq", "calib": "varied", "group_size": 32}
    assert outline(src, Recipe(**of), "cpu").method.recipe.seq_len == 512
    assert outline(src, Recipe(**of, seq_len=300), "cpu").method.recipe.seq_len == 300
    assert outline(src, Recipe(**of, seq_len=600), "cpu").warnings[-1] == said  # rotary positions have no end
    small = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
    counted = OPTConfig(vocab_size=99, num_hidden_layers=2, max_position_embeddings=512, **small)
    OPTForCausalLM(counted).save_pretrained(tmp_path)
    with pytest.raises(LlmqError, match=f"^{said}; give --seq-len 512 or less"):
        outline(str(tmp_path), Recipe(**of, seq_len=600), "cpu")


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_formats_of_groups_hold_no_scale_of_a_whole_tensor(tiny_checkpoint, form):
    with pytest.raises(LlmqError, match=f"{form} holds scales per group or per channel; say --group-size channel"):
        prepare(str(tiny_checkpoint()), Recipe(method="rtn", group_size="tensor", format=form), "cpu")


UNEVEN = {"group_size": 64, "method": "rtn", "format": "compressed-tensors"}  # of K = 64 and 96


def test_what_no_group_divides_is_refused_with_the_whole_list(tiny_checkpoint):
    said = (
        r"model\.layers\.\*\.mlp\.down_proj \(2 linears\): group size 64 does not divide K = 96; --group-size takes 32"
    )
    with pytest.raises(LlmqError, match=said + ".* --on-misfit skip$"):
        prepare(str(tiny_checkpoint(intermediate_size=96)), Recipe(**UNEVEN), "cpu")
    odd = {"intermediate_size": 100, "hidden_size": 72, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(
        LlmqError, match=r"q_proj \(2 linears\), [^:]*: [^:]*K = 72; [^:]*down_proj \(2 .*K = 100; say --group-size ch"
    ):
        prepare(str(tiny_checkpoint(**odd)), Recipe(**UNEVEN), "cpu")


def test_what_no_group_divides_is_left_float_where_that_is_asked_for(tiny_checkpoint, tmp_path):
    plan = prepare(str(tiny_checkpoint(intermediate_size=96)), Recipe(**UNEVEN, on_misfit="skip"), "cpu")
    left = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert plan.skipped == [*left, "lm_head"] == plan.config()["ignore"] and len(plan.matrices) == 12
    (said,) = [w for w in plan.warnings if "down_proj" in w]
    assert said.startswith("left float, as --on-misfit skip asks: model.layers.*.mlp.down_proj (2 linears): group size")
    record = quantize(plan, tmp_path / "out")
    assert said in record["warnings"] and record["recipe"]["on_misfit"] == "skip"
    assert "on_misfit: skip" in (tmp_path / "out" / "recipe.yaml").read_text()
    with pytest.raises(LlmqError, match=r"K = 96.*; nothing is left to quantize"):
        prepare(str(tiny_checkpoint(hidden_size=96, intermediate_size=96)), Recipe(**UNEVEN, on_misfit="skip"), "cpu")


@pytest.mark.parametrize(("form", "why"), [("gptq", "do not fill 32-bit words"), ("awq", "no multiple of 8")])
def test_rows_that_do_not_fill_words_are_left_float_too(tiny_checkpoint, form, why):
    narrow = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 64}
    options = {"group_size": "channel", "method": "rtn", "format": form}
    with pytest.raises(LlmqError, match=f"k_proj .*{why}.*use --format compressed-tensors, or"):
        prepare(str(tiny_checkpoint(**narrow)), Recipe(**options), "cpu")
    plan = prepare(str(tiny_checkpoint(**narrow)), Recipe(**options, on_misfit="skip"), "cpu")
    assert {n.rpartition(".")[2] for n in plan.skipped} == {"k_proj", "v_proj", "lm_head"}
    assert any("not quantized alike" in w for w in plan.warnings)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "lfm2", "falcon_h1", "deepseek_v3"])
def test_scales_of_a_cache_without_keys_of_their_own_are_refused_before_any_work(tmp_path, name):
    FAMILIES[name].save(tmp_path)
    options = {"method": "rtn", "group_size": 32, "kv_bits": 8}
    with pytest.raises(
        LlmqError, match=r"layers\.0 \(\w+\) is not one attention whose keys a k_proj makes; leave --kv-bits"
    ):
        prepare(str(tmp_path), Recipe(**options), "cpu")


def test_what_transforms_leave_alone_is_said_before_any_work(tiny_checkpoint, tmp_path):
    assert not prepare(str(tiny_checkpoint()), Recipe(method="awq,rtn", group_size=32), "cpu").warnings
    FAMILIES["olmo2"].save(tmp_path)
    plan = prepare(str(tmp_path), Recipe(method="awq,rtn", group_size=32), "cpu")
    nothing = "no norm or linear feeds them alone, channel by channel"
    assert plan.warnings == [
        f"awq: left alone in 2 of 2 blocks: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj ({nothing})",
        f"awq: left alone in 2 of 2 blocks: mlp.gate_proj, mlp.up_proj ({nothing})",
    ]
    assert [s.producer is None for s in plan.sites[0]] == [True, False, True, False]
    with pytest.raises(
        LlmqError, match=r"finds nothing to fold scales into, not into what comes before self_attn\.q_proj"
    ):
        prepare(str(tmp_path), Recipe(method="smoothquant:linears=false,rtn", group_size=32), "cpu")


SMALL = {"samples": 2, "seq_len": 16}


@pytest.mark.parametrize(
    ("out", "options", "config"),
    [
        ("gptq", {"bits": 3, "group_size": "channel"}, {}),
        ("gptq", {"lm_head": True}, {"tie_word_embeddings": True}),
        ("awq", {"format": "awq", "sym": False, "skip": ("o_proj",)}, {"attention_bias": True}),
        ("mixed", {"format": "compressed-tensors", "override": ("down_proj:bits=5",)}, {}),
        ("static", {"bits": 8, "act_bits": 8, "act": "tensor", "group_size": "channel", **SMALL}, {}),
        ("cache", {"kv_bits": 8, "kv": "head", **SMALL}, {}),
        ("x.gguf", {"type": "Q4_K_M"}, {"tie_word_embeddings": True}),
        ("x.gguf", {"type": "F16"}, {"rope_parameters": LLAMA3}),
    ],
)
def test_the_bytes_of_what_is_written_are_known_before(tiny_checkpoint, tmp_path, prose, out, options, config):
    (tmp_path / "t.txt").write_text(prose(500))
    options = {"method": "rtn", "group_size": 32, **options}
    if out.endswith(".gguf"):
        options = {"format": "gguf", **{k: v for k, v in options.items() if k != "group_size"}}
    elif options.get("samples"):
        options["calib"] = str(tmp_path / "t.txt")
    plan = prepare(str(tiny_checkpoint(dtype=torch.bfloat16, **config)), Recipe(**options), "cpu")
    quantize(plan, tmp_path / out)
    if out.endswith(".gguf"):
        written = sum(int(t.n_bytes) for t in GGUFReader(tmp_path / out).tensors)
    else:
        written = sum(t.nbytes for t in load_file(tmp_path / out / "model.safetensors").values())
    assert plan.bytes() == written == sum(plan.disk().values()) - plan.disk()["parts"] - plan.disk()["states"]
