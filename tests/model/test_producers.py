"""Producers are found as the code of each family has them, and refused where something else reads them too."""

import copy
from collections import UserDict
from dataclasses import replace

import pytest
import torch
from _families import FAMILIES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.checkpoint import Source
from llmq.model import producers
from llmq.model.experts import Experts
from llmq.model.producers import drawn, find, of_blocks, structure
from llmq.model.skeleton import Skeleton
from llmq.types import Producer

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
IDS = torch.arange(2, 34)[None]
feeds = producers._Doubling.feeds

QKV, GATE_UP = "q_proj k_proj v_proj in self_attn", "gate_proj up_proj in mlp"
HEADS = "o_proj <- v_proj 0:16 0:32 16:32 heads"
LLAMA = (f"{QKV} <- input_layernorm w", HEADS, f"{GATE_UP} <- post_attention_layernorm w", "down_proj <- up_proj")
POST_NORM = (f"{QKV} <- none", HEADS, f"{GATE_UP} <- none", "down_proj <- up_proj")
FUSED_UP = ("gate_up_proj <- post_attention_layernorm w", "down_proj <- gate_up_proj 96:192")
INTERLEAVED = (
    "query_key_value <- input_layernorm w", "dense <- query_key_value 32:48 80:96 128:144 176:192 heads",
    "dense_h_to_4h <- post_attention_layernorm w", "dense_4h_to_h <- none",
)  # fmt: skip
PARALLEL = ("q_proj k_proj v_proj gate_proj up_proj in  <- input_layernorm w", HEADS, "down_proj <- up_proj")
GEMMA = (
    f"{QKV} <- input_layernorm 1 + w", HEADS, f"{GATE_UP} <- pre_feedforward_layernorm 1 + w", "down_proj <- up_proj"
)  # fmt: skip
RIGHT = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "ministral", "seed_oss"], LLAMA),
    **dict.fromkeys(["hunyuan_v1_dense", "stablelm", "helium"], LLAMA),
    **dict.fromkeys(["olmo", "olmo2", "olmo3", "exaone4"], POST_NORM),
    **dict.fromkeys(["gemma2", "gemma3_text"], GEMMA),
    "gemma": tuple(line.replace("norm w", "norm 1 + w") for line in LLAMA),
    "phi3": (
        "qkv_proj <- input_layernorm w", "o_proj <- qkv_proj 96:112 96:128 112:128 heads", *FUSED_UP,
    ),
    "glm": (*LLAMA[:2], *FUSED_UP),
    "glm4": (*LLAMA[:2], *FUSED_UP),
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "phi": ("q_proj k_proj v_proj fc1 in  <- input_layernorm w", HEADS.replace("o_proj", "dense"), "fc2 <- none"),
    "falcon": (
        "query_key_value dense_h_to_4h in  <- input_layernorm w",
        "dense <- query_key_value 80:96 80:96 80:96 80:96 heads", "dense_4h_to_h <- none",
    ),
    **dict.fromkeys(["persimmon", "gpt_neox", "bloom"], INTERLEAVED),
    "starcoder2": (*LLAMA[:2], "c_fc <- post_attention_layernorm w", "c_proj <- none"),
    "nemotron": (
        f"{QKV} <- input_layernorm 1 + w", HEADS, "up_proj <- post_attention_layernorm 1 + w", "down_proj <- none",
    ),
    "arcee": (*LLAMA[:2], "up_proj <- post_attention_layernorm w", "down_proj <- none"),
    "apertus": (
        f"{QKV} <- attention_layernorm w", HEADS, "up_proj <- feedforward_layernorm w", "down_proj <- none",
    ),
    "opt": (
        f"{QKV} <- self_attn_layer_norm w", "out_proj <- v_proj heads", "fc1 <- final_layer_norm w", "fc2 <- fc1",
    ),
}  # fmt: skip


def loaded(kind, dtype=torch.float32, number=1, **changes):
    """Return a block of a family with random weights, random hidden states, and the rest of its call."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in (SIZES | changes).items() if (kind, k) != ("falcon", "head_dim")}  # there it is computed
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).to(dtype).eval()
    for name, p in model.named_parameters():
        bias = "bias" in name
        p.data.normal_(0, 0.15 if p.dim() > 1 else 0.02 if bias else 0.3).add_(0 if p.dim() > 1 or bias else 1.0)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == sizes["num_hidden_layers"])
    calls = []
    hook = block[number].register_forward_pre_hook(lambda m, a, k: calls.append((a[0], (a[1:], k))), with_kwargs=True)
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    return block[number], drawn(calls[0][0]), calls[0][1]


def said(found):
    """Return sites as the table above has them."""
    for site in found.sites:
        linears, by = " ".join(n.rpartition(".")[2] for n in site.linears), site.producer
        inside = f" in {site.parent}" if len(site.linears) > 1 else ""
        assert inside or site.parent == site.linears[0]
        parts = ["none"] if by is None else [by.module.rpartition(".")[2], by.gain, *runs(by.rows or ())]
        yield f"{linears}{inside} <- {' '.join([p for p in parts if p] + ['heads'] * bool(by and by.per_head))}"


def runs(rows):
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [f"{rows[a]}:{rows[b - 1] + 1}" for a, b in zip(starts, [*starts, len(rows)][1:], strict=True)]


def sought(block, hidden, call):
    with torch.no_grad():
        return find(block, hidden, call, 16, "llama")


@pytest.mark.parametrize("kind", RIGHT)
def test_producers_are_those_of_the_familys_code(kind):
    assert tuple(said(sought(*loaded(kind)))) == RIGHT[kind]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3_text", "glm4", "cohere", "olmo2", "falcon", "gpt_neox"])
def test_bfloat16_tells_the_same(kind):
    assert tuple(said(sought(*loaded(kind, torch.bfloat16)))) == RIGHT[kind]


def test_all_33_families_are_there():
    assert len(RIGHT) == 33


class Peeking(nn.Module):
    """Around a Llama block: a second reader of what one of its linears reads, of some channels alone."""

    def __init__(self, block, linear, channels=slice(None)):
        super().__init__()
        self.block, self.seen = block, 0.0
        block.get_submodule(linear).register_forward_pre_hook(lambda m, a: self.peek(a[0][..., channels]))

    def peek(self, x):
        self.seen = x.tanh().sum()

    def forward(self, hidden, shared=None, **kwargs):
        out = self.block(hidden, **kwargs)
        if shared is None:
            return out + 1e-3 * self.seen
        shared["seen"] = self.seen  # as some models hand keys and values on to later blocks
        return out


@pytest.mark.parametrize("channels", [slice(None), slice(4, 5)], ids=["all", "one"])
@pytest.mark.parametrize("number", range(4))
def test_a_hidden_second_reader_is_refused(number, channels):
    block, hidden, call = loaded("llama")
    right = [s.producer.module for s in sought(block, hidden, call).sites]
    linear = sought(block, hidden, call).sites[number].linears[0]
    found = sought(Peeking(block, linear, channels), hidden, call)
    got = [s.producer and s.producer.module.removeprefix("block.") for s in found.sites]
    assert got == [*right[:number], None, *right[number + 1 :]]
    assert found.reasons == {f"block.{linear}": f"block.{right[number]} feeds something else too"}


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_reader_behind_the_block_is_seen_in_its_arguments(kind):
    block, hidden, (args, kwargs) = loaded("llama")
    found = sought(Peeking(block, "self_attn.o_proj"), hidden, (args, kwargs | {"shared": kind()}))
    assert found.reasons == {"block.self_attn.o_proj": "block.self_attn.v_proj feeds something else too"}


def test_one_scale_is_not_shared_by_sites():
    """Linears that read copies of a norm's output would each choose a scale of their own."""
    block, hidden, call = loaded("llama")
    block.mlp.gate_proj.register_forward_pre_hook(lambda m, a: (a[0] * 1,))
    found = sought(block, hidden, call)
    assert found.reasons == dict.fromkeys(
        ["mlp.gate_proj", "mlp.up_proj"], "post_attention_layernorm feeds several sites, which would need one scale"
    )


def test_experts_are_found_by_the_first_and_proved_together(tmp_path, monkeypatch):
    FAMILIES["qwen3_moe"].save(tmp_path)
    skeleton, tried = Skeleton(Source(tmp_path), torch.float32), []
    monkeypatch.setattr(producers._Doubling, "feeds", lambda self, d: tried.append(self.name) or feeds(self, d))
    dense, mixed = of_blocks(skeleton, torch.device("cpu"))
    assert tuple(said(dense)) == LLAMA
    down = {s.linears: s.producer for s in mixed.sites if s.linears[0].endswith("down_proj")}
    assert down == {(f"mlp.experts.{e}.down_proj",): Producer(f"mlp.experts.{e}.up_proj") for e in range(4)}
    assert "mlp.experts.0.up_proj" in tried and "mlp.experts.1.up_proj" not in tried
    router = "post_attention_layernorm feeds something else too"
    assert mixed.reasons == {f"mlp.experts.{e}.gate_proj": router for e in range(4)}
    with skeleton.loaded(1, torch.device("cpu")) as block:
        assert not any(m.every for m in block.modules() if isinstance(m, Experts))


def test_experts_whose_output_something_else_reads_too_keep_their_scales(tmp_path):
    FAMILIES["qwen3_moe"].save(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    read = []
    with skeleton.loaded(1, torch.device("cpu")) as block:
        expert = block.mlp.experts.get_submodule("2")
        expert.down_proj.register_forward_pre_hook(lambda m, a: read.append(a[0].sum()))
        block.register_forward_hook(lambda m, a, out: out + 1e-3 * read.pop())
        hidden, calls = producers.entering(skeleton, torch.device("cpu"))
        found = sought(block, drawn(hidden), calls[1])
    assert [s.linears[0] for s in found.sites if s.producer] == [
        "self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.down_proj"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_are_always_0_are_found_too(dtype):
    """As Gemma 3's, some of whose gains are 0, and pruned models' rows."""
    block, hidden, call = loaded("gemma3_text", dtype)
    block.input_layernorm.weight.data[5] = block.pre_feedforward_layernorm.weight.data[9] = -1
    for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj"):
        block.get_submodule(name).weight.data[7:9] = 0
    assert tuple(said(sought(block, hidden, call))) == GEMMA


def test_a_gate_that_never_opens_tells_nothing():
    block, hidden, call = loaded("opt")
    block.fc1.bias.data[7] = -1e4
    assert sought(block, hidden, call).reasons == {"fc2": "some of their channels are 0 in what was tried"}


def test_a_gain_of_an_unknown_kind_is_refused():
    block, hidden, call = loaded("llama")
    norm = block.input_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) * norm.weight  # its square
    found = sought(block, hidden, call)
    assert found.reasons == {"self_attn.q_proj": "it is not known how input_layernorm stores its gain"}


def test_what_is_tried_leaves_the_block_as_it_was():
    block, hidden, call = loaded("phi3")
    before = copy.deepcopy(block.state_dict())
    sought(block, hidden, call)
    assert all(torch.equal(t, before[n]) for n, t in block.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_blocks_that_are_built_alike_are_tried_once(tmp_path, monkeypatch):
    config = AutoConfig.for_model("gemma3_text", **SIZES | {"num_hidden_layers": 4}, sliding_window=4)
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    skeleton, tried = Skeleton(Source(tmp_path), torch.float32), []
    monkeypatch.setattr(producers, "find", lambda *a: tried.append(a) or find(*a))
    found = of_blocks(skeleton, torch.device("cpu"))
    assert len(tried) == 2 and len(found) == 4 and found[0] is found[2]
    assert all(tuple(said(f)) == GEMMA for f in found)
    kinds = [structure(b) for b in skeleton.blocks]
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


def test_an_override_changes_what_was_found(monkeypatch):
    monkeypatch.setattr(producers, "overridden", lambda kind, sites: (sites[0], replace(sites[1], producer=None)))
    block, hidden, call = loaded("llama")
    found = sought(block, hidden, call)
    assert [s.producer for s in found.sites] == [Producer("input_layernorm", gain="w"), None]
    assert found.reasons == {"self_attn.o_proj": "the override of llama leaves them"}
