"""Suspended forwards see what plain forwards see; discovery finds which linears read one activation."""

import pytest
import torch
from _families import FAMILIES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from llmq import aside
from llmq.checkpoint import Source
from llmq.loading import load
from llmq.model.ends import embed
from llmq.model.lanes import Lanes, run
from llmq.model.sites import discover, refuse_other_matrices
from llmq.model.skeleton import Skeleton
from llmq.types import LlmqError, Site

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GATED = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2}


def blocks_outputs(skeleton, tokens, batch):
    """Advance through all blocks with every linear's site suspended; return the last hidden states."""
    hidden, calls = embed(skeleton, tokens.split(batch), CPU)
    with torch.no_grad():
        for i in range(len(skeleton)):
            at = [c[i] for c in calls]
            with skeleton.loaded(i, CPU) as block:
                sites = discover(block, hidden[0], at[0])
                with Lanes(block, sites, hidden, at) as lanes:
                    for _ in sites:
                        assert sum(x.shape[0] for x in lanes.advance()) == tokens.numel()
                    hidden = list(lanes.finish())
    return torch.cat(hidden)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_skeleton_is_the_model_that_load_gives(changes, dtype, tiny_checkpoint):
    folder = tiny_checkpoint(dtype=torch.bfloat16, **changes)
    with torch.no_grad():
        want = load(folder, dtype=dtype)(TOKENS).logits
        model = Skeleton(Source(folder), dtype).filled(CPU)
        assert torch.equal(model(TOKENS).logits, want) and not model.training and model.dtype == dtype


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**GATED, sliding_window=8),
        Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        Qwen3Config(**GATED, head_dim=16),
        Phi3Config(**GATED),
        GPTNeoXConfig(**SMALL, intermediate_size=96),
        OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64),
    ],
    ids=lambda c: c.model_type,
)
@pytest.mark.parametrize("batch", [2, 5])
def test_suspended_forwards_equal_the_models_own(config, batch, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    want = {}
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    last = model.get_submodule(skeleton.prefix)[-1]
    last.register_forward_hook(lambda m, a, out: want.update(y=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(TOKENS)
    torch.testing.assert_close(blocks_outputs(skeleton, TOKENS, batch), want["y"], rtol=1e-4, atol=1e-5)
    assert all(p.is_meta for p in skeleton.model.parameters())


@pytest.fixture
def entered(tiny_llama):
    """The first block of a tiny Llama, the hidden states that enter it, and the rest of its call."""
    model, seen = tiny_llama(), {}
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0], call=((), k)), with_kwargs=True)
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return block, seen["x"], seen["call"]


def test_discovery_finds_what_reads_one_activation_in_the_order_it_runs(entered):
    block, hidden, call = entered
    with torch.no_grad():
        found = discover(block, hidden, call)
    names = [[n.rpartition(".")[2] for n in s.linears] for s in found]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_true_sequential_later_sites_see_the_quantized_weights_of_earlier_ones(entered):
    block, hidden, call = entered
    with torch.no_grad(), Lanes(block, discover(block, hidden, call), [hidden], [call]) as lanes:
        list(lanes.advance())
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight.zero_()
        assert all((x == 0).all() for x in lanes.advance())  # o_proj reads attention over zero values


class Twice(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.a, self.b, self.times = nn.Linear(8, 8), nn.Linear(8, 8), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.a(x)
        return self.b(x)


@pytest.mark.parametrize("times", [0, 2])
def test_linears_not_called_once_are_refused_by_name(times):
    block, x = Twice(times), torch.randn(1, 4, 8)
    with pytest.raises(LlmqError, match="a: not called exactly once"):
        discover(block, x, ((), {}))
    sites = (Site(("a",)), Site(("b",)))
    with pytest.raises(LlmqError, match="rtn"), Lanes(block, sites, [x], [((), {})]) as lanes:
        for _ in sites:
            list(lanes.advance())
        list(lanes.finish())
    assert torch.equal(run(block, x, ((), {})), block(x))  # no hook is left behind


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (MixtralConfig(**GATED, num_local_experts=2), "experts"),
        (GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4), "Conv1D"),
    ],
    ids=["mixtral", "gpt2"],
)
def test_other_weight_matrices_are_refused_by_name(config, what):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = (model.model.layers if what == "experts" else model.transformer.h)[0]
    with pytest.raises(LlmqError, match=what):
        refuse_other_matrices(block, "block 0")


def test_an_unknown_architecture_is_named(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "lama"')
    (folder / "config.json").write_text(config)
    with pytest.raises(LlmqError, match="model_type 'lama'"):
        Skeleton(Source(folder), torch.float32)


def test_a_tensor_of_the_wrong_shape_is_named(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = (folder / "config.json").read_text().replace('"intermediate_size": 128', '"intermediate_size": 160')
    (folder / "config.json").write_text(config)
    with pytest.raises(LlmqError, match=r"mlp\.\w+_proj\.weight is \[.*asks for"):
        Skeleton(Source(folder), torch.float32)


def test_a_block_that_computes_tables_for_itself_is_loaded_again(tmp_path):
    FAMILIES["falcon_h1"].save(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    (hidden,), (calls,) = embed(skeleton, [torch.arange(8)[None]], CPU)
    buffers, outputs = [], []
    for _ in range(2):
        with skeleton.loaded(0, CPU) as block, torch.no_grad():
            buffers.append({n: b.clone() for n, b in block.named_buffers()})
            outputs.append(run(block, hidden, calls[0]))
    assert buffers[0] and all(torch.equal(b, buffers[1][n]) for n, b in buffers[0].items())
    assert torch.equal(*outputs) and all(p.is_meta for p in skeleton.model.parameters())


def test_heads_that_differ_in_size_have_no_one_basis(tmp_path):
    FAMILIES["gemma4_text"].save(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    assert [skeleton.head_dim_of(i) for i in range(4)] == [16, 32, 16, 32]
    with pytest.raises(LlmqError, match="heads of 16 and 32 channels in model_type 'gemma4_text'; leave rotate out"):
        skeleton.head_dim  # noqa: B018


@pytest.mark.parametrize("experts", [True, False])
def test_a_block_that_was_read_ahead_is_the_block(experts, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = MixtralConfig(**GATED, num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    assert list(skeleton.reads(range(2), CPU)) == [None, None]  # as it comes, on the CPU
    monkeypatch.setattr(aside, "pays", lambda device: True)
    for i, read in enumerate(skeleton.reads(range(3), CPU, experts=experts)):
        assert read and all(t.dtype == torch.bfloat16 and t.device == CPU for t in read.values())
        with skeleton.loaded(i, CPU, experts=experts) as block:
            wanted = {n: t.clone() for n, t in block.state_dict().items()}
        with skeleton.loaded(i, CPU, experts=experts, read=read) as block:
            found = block.state_dict()
            assert not read  # nothing of it stays beside the block
            assert list(found) == list(wanted) and (experts or any(t.is_meta for t in found.values()))
            assert all(t.is_meta or torch.equal(found[n], t) for n, t in wanted.items())
            assert all(t.is_meta == found[n].is_meta for n, t in wanted.items())
