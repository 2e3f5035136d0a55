"""Rotations leave the function of the whole model unchanged, spread outliers, and say what a tied head costs."""

import json
from dataclasses import replace
from functools import partial

import gguf
import pytest
import torch
from _families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from llmq.algorithms.rotate import Rotate, orthogonal
from llmq.checkpoint import Source
from llmq.gguf.reader import GgufFile
from llmq.loading import load
from llmq.model.rotated import Rotated, prove
from llmq.model.skeleton import Skeleton
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


STREAM = "rotate:heads=false:residual=true:untie=true,rtn"
BIASED = partial(LlamaConfig, attention_bias=True, mlp_bias=True)  # also where the stream is written: o_proj, down_proj


@pytest.mark.parametrize("n", [1, 12, 64, 576])
def test_orthogonal(n):
    Q = orthogonal(n, torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-6, rtol=0)
    assert Q.abs().max() < 4 * n**-0.5
    power = n & -n
    assert power < n or torch.allclose(Q.abs(), torch.full_like(Q, n**-0.5))


def rotated(folder, step):
    """Return the float model of a rotated checkpoint, and the checkpoint."""
    source = Rotated(Skeleton(Source(folder), torch.float32), step)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = source.config["tie_word_embeddings"]
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict({n: source.get(n) for n in source.names()}, strict=not config.tie_word_embeddings)
    return model, source


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Qwen3Config, BIASED])
@pytest.mark.parametrize("options", [{}, {"residual": True, "untie": True}, {"residual": True, "heads": False}])
def test_the_function_is_unchanged(config, options, tied, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, tie_word_embeddings=tied)).eval()
    for name, p in model.named_parameters():
        p.data += 0.3 * torch.rand_like(p) if "norm" in name or "bias" in name else 0.0
    model.save_pretrained(tmp_path)
    step = Rotate(**options)
    if tied and step.residual and not step.untie:
        with pytest.raises(LlmqError, match=r"^rotate:.*residual=True unties the head of .* adds 0.1 MB; say so"):
            rotated(tmp_path, step)
        return
    turned, source = rotated(tmp_path, step)
    with torch.no_grad():
        torch.testing.assert_close(turned(IDS).logits, model(IDS).logits, atol=2e-4, rtol=1e-4)
    assert turned.config.tie_word_embeddings == (tied and not step.residual)
    assert set(source.headers()) == set(source.names())
    before = dict(model.named_parameters())
    for name in ("v_proj", "o_proj", "q_proj"):
        full = f"model.layers.1.self_attn.{name}.weight"
        changed = (name != "q_proj" and step.heads) or step.residual
        assert torch.allclose(source.get(full), before[full], atol=1e-6) == (not changed)


def family(kind, folder):
    """Write a small model of a family, its norms and biases random, and return it."""
    torch.manual_seed(0)
    sizes = SIZES | {"pad_token_id": 0, "max_position_embeddings": 64, "tie_word_embeddings": True}
    if kind == "falcon":
        del sizes["head_dim"]  # which it computes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for name, p in model.named_parameters():
        p.data += 0.3 * torch.rand_like(p) if "norm" in name or "bias" in name else 0.0
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in ("phi3", "gemma3_text", "glm4", "cohere", "olmo2", "gpt_neox", "falcon", "opt")]
    + [(kind, {"residual": True, "untie": True}) for kind in ("granite", "gemma", "phi3", "smollm3")],
)
def test_every_family_is_rotated_where_it_is_sound(kind, options, tmp_path):
    model = family(kind, tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    turned, source = rotated(tmp_path, Rotate(**options))
    prove(Skeleton(source, torch.float32), source, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(turned(IDS).logits, model(IDS).logits, atol=2e-4, rtol=1e-4)
    changed = [
        n
        for n, _ in skeleton.linears()
        if not torch.equal(source.get(f"{n}.weight"), skeleton.source.get(f"{n}.weight"))
    ]
    assert len(changed) >= 4 if not options else len(changed) == len([*skeleton.linears()])


@pytest.mark.parametrize(
    ("kind", "message"),
    [("gemma3_text", "block 0 of model_type 'gemma3_text' changes by"), ("olmo2", "block 0 of"), ("glm4", "block 0 of"),
     ("cohere", "block 0 of model_type 'cohere'"), ("opt", "what enters the blocks of model_type 'opt'")],
)  # fmt: skip
def test_a_residual_stream_that_cannot_turn_is_refused(kind, message, tmp_path):
    family(kind, tmp_path)
    with pytest.raises(LlmqError, match=rf"^rotate:residual=True:untie=True: {message}.*; leave residual out$"):
        prepare(str(tmp_path), Recipe(method="rotate:residual=true:untie=true,rtn", group_size="channel"), "cpu")


def test_a_model_that_reads_images_is_rotated_within_its_heads_alone(tmp_path):
    FAMILIES["qwen3_vl"].save(tmp_path)
    skeleton, cpu = Skeleton(Source(tmp_path), torch.float32), torch.device("cpu")
    source = Rotated(skeleton, Rotate())
    turned, plain = (Skeleton(s, torch.float32).filled(cpu) for s in (source, Source(tmp_path)))
    with torch.no_grad():
        torch.testing.assert_close(turned(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=2e-4, rtol=1e-4)
    values = [n for n, _ in skeleton.linears() if n.endswith("v_proj")]
    assert all(not torch.equal(source.get(f"{n}.weight"), skeleton.source.get(f"{n}.weight")) for n in values)
    with pytest.raises(LlmqError, match="what model_type 'qwen3_vl' sees in images would enter unturned; leave resid"):
        prepare(str(tmp_path), Recipe(method="rotate:residual=true:untie=true,rtn", group_size="channel"), "cpu")


def test_a_stream_through_linear_attention_turns(tmp_path):
    replace(FAMILIES["qwen3_5_text"], beside={}).save(tmp_path)
    recipe = Recipe(method=STREAM, group_size=32, format="compressed-tensors")
    source = prepare(str(tmp_path), recipe, "cpu").source
    turned, plain = (Skeleton(s, torch.float32).filled(torch.device("cpu")) for s in (source, Source(tmp_path)))
    with torch.no_grad():
        got, want = turned(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert (got - want).norm() < 0.02 * want.norm()  # embedding and head are rounded to bfloat16 again
    linears = [f"{n}.weight" for n, _ in source.skeleton.linears()]
    assert all(not torch.equal(source.get(n), source.base.get(n)) for n in linears)


@pytest.mark.parametrize(("kind", "stranger"), [("qwen3_5_text", "mtp.fc"), ("deepseek_v3", "model.layers.61")])
def test_a_stream_that_others_read_too_is_not_turned(kind, stranger, tmp_path):
    """A head for further tokens, which does not run here."""
    FAMILIES[kind].save(tmp_path)
    with pytest.raises(LlmqError, match=rf"^rotate:heads=False.*: {stranger}.* beside the language model"):
        prepare(str(tmp_path), Recipe(method=STREAM, group_size=32, format="compressed-tensors"), "cpu")
    heads = Rotated(Skeleton(Source(tmp_path), torch.float32), Rotate())
    own = next(n for n in heads.names() if n.startswith(stranger))
    assert torch.equal(heads.get(own), heads.base.get(own))


def test_gated_attention_has_no_heads_to_turn(tmp_path):
    """Each channel of a head has a gate of its own behind the attention."""
    FAMILIES["qwen3_5_text"].save(tmp_path)
    with pytest.raises(LlmqError, match="rotate: nothing passes from a linear to another by heads"):
        prepare(str(tmp_path), Recipe(method="rotate,rtn", group_size=32, format="compressed-tensors"), "cpu")


def test_outliers_are_spread(tiny_llama, tmp_path):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[:, 5] *= 50
    model.model.layers[0].self_attn.v_proj.weight.data[3] *= 50
    model.save_pretrained(tmp_path)
    source = rotated(tmp_path, Rotate(residual=True))[1]
    for name in ("q_proj", "v_proj"):
        before, after = (s.get(f"model.layers.0.self_attn.{name}.weight") for s in (Source(tmp_path), source))
        peak = [float(w.abs().max() / w.square().mean().sqrt()) for w in (before, after)]
        assert peak[1] < 0.5 * peak[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_is_quantized_loaded_and_answers(tiny_checkpoint, tiny_llama, prose, tmp_path, tied):
    text = tmp_path / "calibration.txt"
    text.write_text(prose(2000))
    folder, out = tiny_checkpoint(tie_word_embeddings=tied), tmp_path / "out"
    method = "rotate:residual=true:untie=true,qep,gptq"
    recipe = Recipe(method=method, bits=8, group_size=32, samples=8, seq_len=32, calib=str(text))
    quantize(prepare(str(folder), recipe, "cpu"), out)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with torch.no_grad():
        p, q = (m(IDS).logits.log_softmax(-1) for m in (tiny_llama(tie_word_embeddings=tied), load(out)))
    assert (p.exp() * (p - q)).sum(-1).mean() < 2e-3


def test_gguf_holds_the_rotated_values(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    recipe = Recipe(method="rotate,rtn", format="gguf:pre=llama-bpe", type="Q8_0")
    quantize(prepare(str(folder), recipe, "cpu"), out)
    want = Rotated(Skeleton(Source(folder), torch.float32), Rotate()).get("model.layers.0.self_attn.v_proj.weight")
    stored = GgufFile(out).tensors["blk.0.attn_v.weight"]
    got = torch.from_numpy(gguf.dequantize(stored.data, gguf.GGMLQuantizationType.Q8_0).copy())
    assert (got - want).abs().max() < 0.01 * want.abs().max()


def test_errors(tiny_checkpoint):
    with pytest.raises(ValueError, match="both off"):
        Rotate(heads=False)
    with pytest.raises(LlmqError, match="edits the weights before rounding"):
        prepare(str(tiny_checkpoint()), Recipe(method="rotate,rtn", dtype="bfloat16"), "cpu")
    with pytest.raises(LlmqError, match="is a rotation and cannot follow a transform"):
        prepare(str(tiny_checkpoint()), Recipe(method="awq,rotate,rtn"), "cpu")
