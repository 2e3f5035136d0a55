"""An adapter added as the weights are read gives what peft merges, bit for bit, on every path; others are refused."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint import Source
from llmq.inspection import inspect
from llmq.model.adapter import Adapted, Adapter
from llmq.model.skeleton import Skeleton
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft, transformers
BASE = {"group_size": 32, "samples": 8, "seq_len": 32}
Q = "model.layers.0.self_attn.q_proj"


def trained(base, folder, dtype=torch.float32, **options):
    """Write an adapter of a checkpoint with peft, all of whose parameters have moved; return its folder."""
    peft = pytest.importorskip("peft", reason="needs peft (pip install -e '.[test]')")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | options))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({n: t.to(dtype).contiguous() for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


def merged(base, folder, out):
    """Write what peft merges, with the base's tokenizer; return its folder."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def adapted(base, folder):
    return Adapted(Skeleton(Source(base), torch.float32), Adapter(folder))


KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "every linear, rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 0.7},
    "by pattern": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 7, "up_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 3, "q_proj": 1, r".*_proj": 40},
    },
    "one layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "some left out": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "biases of all": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of its own": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "lora_bias": {"target_modules": ["q_proj", "gate_proj"], "lora_bias": True},
    "saved whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "another start": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_what_peft_merges(kind, dtype, tiny_checkpoint, tmp_path):
    biases = {"attention_bias": True, "mlp_bias": True} if "bias" in kind else {}
    base = tiny_checkpoint(dtype=dtype, **biases)
    folder = trained(base, tmp_path / "adapter", **KINDS[kind])
    want, got = Source(merged(base, folder, tmp_path / "merged")), adapted(base, folder)
    before, changed = Source(base), 0
    assert set(got.names()) == set(want.names()) and got.headers() == before.headers()
    for name in got.names():
        assert torch.equal(got.get(name), want.get(name)), name
        changed += not torch.equal(got.get(name), before.get(name))
    assert changed >= len({n.rpartition(".lora_")[0] for n in load_file(folder / "adapter_model.safetensors")} - {""})


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_an_adapter_stored_in_halves(stored, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(dtype=torch.bfloat16)
    folder = trained(base, tmp_path / "adapter", stored, target_modules=["q_proj"])
    want, got = Source(merged(base, folder, tmp_path / "merged")), adapted(base, folder)
    assert all(torch.equal(got.get(n), want.get(n)) for n in got.names())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn"},
        {
            "method": "fisher,qep,gptq,descent",
            "target_bpw": 4.5,
            "bit_choices": "3,4,8",
            "format": "compressed-tensors",
        },
        {"method": "rotate:residual=true,awq,rtn"},
        {"method": "gptq,signround:steps=2,distill:epochs=1", "bits": 3, "calib": "self"},
        {"method": "rtn", "format": "gguf:pre=gpt-2", "type": "Q4_0", "group_size": None},
    ],
    ids=lambda v: f"{v['method']}-{v.get('calib', 'text')}-{v.get('format', '')}",
)
def test_every_path_sees_the_adapted_weights(options, tiny_checkpoint, tmp_path, prose):
    """The files are byte for byte those that the merged checkpoint gives."""
    (tmp_path / "text.txt").write_text(prose(2000))
    base = tiny_checkpoint()
    folder = trained(base, tmp_path / "adapter", target_modules="all-linear")
    merged(base, folder, tmp_path / "merged")
    recipe = Recipe(**(BASE | {"calib": str(tmp_path / "text.txt")} | options))
    name = "out.gguf" if recipe.gguf else "out"
    for place, src, adapter in (("a", base, folder), ("b", tmp_path / "merged", None), ("c", base, None)):
        (tmp_path / place).mkdir()
        summary = quantize(prepare(str(src), recipe, "cpu", adapter), tmp_path / place / name)
        assert (summary["source"]["adapter"] is None) == (adapter is None)
    if recipe.gguf:
        from llmq.gguf.reader import GgufFile

        a, b, c = (GgufFile(tmp_path / place / name).tensors for place in "abc")
        assert all((t.data == b[n].data).all() for n, t in a.items())
        assert any((t.data != c[n].data).any() for n, t in a.items())
    else:
        a, b, c = ((tmp_path / place / name / "model.safetensors").read_bytes() for place in "abc")
        assert a == b != c


def test_the_adapter_is_recorded_and_not_copied(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    snapshot = tmp_path / "models--me--lora/snapshots/c0ffee"
    trained(base, snapshot, target_modules=["q_proj"])
    quantize(prepare(str(base), Recipe(method="rtn", group_size=32), "cpu", str(snapshot)), tmp_path / "out")
    source = json.loads((tmp_path / "out/quantization.json").read_text())["source"]
    assert source["name"] == base.name and source["commit"] is None
    assert source["adapter"].keys() == {"name", "commit", "sha256"}
    assert (source["adapter"]["name"], source["adapter"]["commit"]) == ("me/lora", "c0ffee")
    assert "with the adapter me/lora at commit c0ffee" in (tmp_path / "out/README.md").read_text()


OPENERS = (llmq.load, llmq.load_tokenizer, lambda folder: list(inspect(str(folder))))


def test_an_adapter_beside_the_weights_wants_the_flag(tiny_checkpoint, tmp_path):
    base, apart = tiny_checkpoint(), tmp_path / "adapter"
    trained(base, apart, target_modules=["q_proj"])
    for work in (lambda: prepare(str(apart), Recipe(**BASE), "cpu"), *(partial(f, apart) for f in OPENERS)):
        with pytest.raises(LlmqError, match=rf"^{apart} is an adapter, not a model; .* --adapter {apart}$"):
            work()
    trained(base, base, target_modules=["q_proj"])
    for work in (
        lambda: prepare(str(base), Recipe(**BASE), "cpu"),
        lambda: prepare(str(base), Recipe(**BASE), "cpu", apart),
        lambda: llmq.load(base),
    ):
        with pytest.raises(LlmqError, match=rf"^{base} holds an adapter .*--adapter {base}, or remove it$"):
            work()
    quantize(prepare(f"{base}/", Recipe(method="rtn", group_size=32), "cpu", base), tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter_*"))
    llmq.load(tmp_path / "out")


def written(folder, config=None, **tensors):
    """Write an adapter by hand; `tensors` are shapes by the name behind `base_model.model.`."""
    folder.mkdir(exist_ok=True)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    parts = tensors or {f"{Q}.lora_A.weight": (4, 64), f"{Q}.lora_B.weight": (64, 4)}
    named = {f"base_model.model.{n}": torch.ones(s) for n, s in parts.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


FACTORS = {f"{Q}.lora_A.weight": (4, 64), f"{Q}.lora_B.weight": (64, 4)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "of kind IA3, where llmq adds LoRA; merge it"),
        ({"peft_type": "LOHA"}, {}, "of kind LOHA"),
        ({"peft_type": None}, {}, "peft_type is None"),
        ({"use_dora": True}, {}, "use_dora is True, which is no plain LoRA; merge it"),
        ({"use_qalora": True}, {}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, {}, r"alora_invocation_tokens is \[1, 2\]"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication"),
        ({"trainable_token_indices": [5]}, {}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, {}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights 'pissa' has moved the base's weights"),
        ({"init_lora_weights": "olora"}, {}, "'olora'"),
        ({"r": "4"}, {}, "r is '4'; it must be of type int"),
        ({"r": 0}, {}, "the rank of .* is 0"),
        ({"lora_alpha": None}, {}, "lora_alpha is None"),
        ({"lora_alpha": 10**400}, {}, "the alpha of .* is no number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, {}, "the alpha of .* is no number"),
        ({"rank_pattern": {"q_proj": float("inf")}}, {}, "the rank of .* is inf"),
        ({"r": 8}, {}, r"lora_A.weight is \[4, 64\], .* asks for \[8, 64\]; the adapter was made for another model"),
        ({"rank_pattern": {"q_proj": 2}}, {}, r"asks for \[2, 64\]"),
        ({"rank_pattern": {"q_proj": "2"}}, {}, "rank_pattern: q_proj is '2'"),
        ({"rank_pattern": ["q_proj"]}, {}, "rank_pattern is"),
        ({"rank_pattern": {"(": 2}}, {}, r"rank_pattern \( cannot be matched"),
        ({"target_modules": ["q_proj", "v_proj"]}, {}, "holds nothing for v_proj, a target module"),
        ({}, {f"{Q}.lora_A.weight": (4, 96), f"{Q}.lora_B.weight": (64, 4)}, r"is \[4, 96\], where .* \[64, 64\] asks"),
        ({}, {f"{Q}.lora_A.weight": (4, 64)}, "lora_A.weight lacks its other factor"),
        ({}, {f"{Q}.lora_B.weight": (64, 4)}, "lora_B.weight lacks its other factor"),
        ({}, FACTORS | {"model.layers.7.mlp.up_proj.lora_A.weight": (4, 64)}, "layers.7.mlp.up_proj.weight, which"),
        ({}, FACTORS | {f"{Q}.lora_B.bias": (64,)}, "changes .*q_proj.bias, which .* does not have"),
        ({}, FACTORS | {"score.weight": (2, 64)}, "changes score.weight, which .* does not have"),
        ({}, FACTORS | {"model.embed_tokens.weight": (322, 64)}, r"is \[322, 64\], where .* \[320, 64\]"),
        ({}, FACTORS | {f"{Q}.lora_magnitude_vector": (64,)}, "is no part of a LoRA adapter"),
        ({}, FACTORS | {f"{Q}.ia3_l": (64,)}, "is no part of a LoRA adapter"),
        ({}, FACTORS | {f"{Q}.weight": (64, 64), f"{Q}.base_layer.weight": (64, 64)}, "changes .* twice"),
        ({}, FACTORS | {f"{Q}.lora_embedding_A": (4, 64)}, "lora_embedding_A lacks its other factor"),
    ],
)
def test_what_is_no_lora_of_this_model_is_one_line(config, tensors, message, tiny_checkpoint, tmp_path):
    folder = written(tmp_path / "adapter", config, **tensors)
    with pytest.raises(LlmqError, match=message) as error:
        prepare(str(tiny_checkpoint()), Recipe(method="rtn", group_size=32), "cpu", folder)
    assert "\n" not in str(error.value) and "adapter" in str(error.value)


def test_files_that_are_missing(tiny_checkpoint, tmp_path):
    base, folder = str(tiny_checkpoint()), tmp_path / "adapter"
    for missing in ("adapter_config.json", "adapter_model.safetensors"):
        written(folder)
        (folder / missing).rename(folder / "adapter_model.bin")
        with pytest.raises(LlmqError, match=f"has no {re.escape(missing)}; --adapter takes what peft saves"):
            prepare(base, Recipe(method="rtn", group_size=32), "cpu", folder)
    written(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(LlmqError, match="truncated"):
        prepare(base, Recipe(method="rtn", group_size=32), "cpu", folder)


def test_a_pattern_cannot_hang(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.model.adapter._SECONDS", 0.05)
    folder = written(tmp_path / "adapter", {"rank_pattern": {r"(\w|\w\w|\w\w\w|\w\.|[a-z_]+)+\d\d\d": 2}})
    with pytest.raises(LlmqError, match="rank_pattern .* cannot be matched"):
        prepare(str(tiny_checkpoint()), Recipe(method="rtn", group_size=32), "cpu", folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_is_not_changed_by_halves(name, tiny_checkpoint, tmp_path):
    folder = written(tmp_path / "adapter", **(FACTORS | {name: (320, 64)}))
    with pytest.raises(LlmqError, match=f"changes {name}, and the head of .* is its embedding; merge it"):
        prepare(str(tiny_checkpoint(tie_word_embeddings=True)), Recipe(method="rtn", group_size=32), "cpu", folder)


def test_weights_that_overflow_are_found(tiny_checkpoint, tmp_path):
    folder = written(tmp_path / "adapter", {"lora_alpha": 1e9})
    with pytest.raises(LlmqError, match=f"{Q}.weight holds NaN or Inf"):
        prepare(str(tiny_checkpoint(dtype=torch.float16)), Recipe(method="rtn", group_size=32), "cpu", folder)


def test_what_has_no_effect_is_said(tiny_checkpoint, tmp_path):
    base = tmp_path / "models--org--base/snapshots/c0ffee"
    base.parent.mkdir(parents=True)
    tiny_checkpoint().rename(base)
    folder = written(tmp_path / "adapter", {"base_model_name_or_path": "org/other", "shiny_lr": 1e-6, "unset": None})
    warnings = prepare(str(base), Recipe(method="rtn", group_size=32), "cpu", folder).warnings
    assert any("was trained on org/other, not on org/base" in w for w in warnings)
    assert any("has shiny_lr, which has no effect" in w for w in warnings)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    warnings = prepare(str(base), Recipe(method="rtn", group_size=32), "cpu", folder).warnings
    assert any("another tokenizer.json than its base" in w for w in warnings)
    assert not any("chat_template.jinja" in w for w in warnings)
    (folder / "tokenizer.json").unlink()
    written(folder, {"base_model_name_or_path": "org/base"})
    assert not any(
        "adapter" in w for w in prepare(str(base), Recipe(method="rtn", group_size=32), "cpu", folder).warnings
    )
