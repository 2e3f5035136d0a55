"""However few batches stay suspended, the same bytes are written."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from _families import FAMILIES, SEQ_LEN
from _tiny import make_prose

from llmq.model.lanes import Lanes
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import Site

CASES = {
    "gptq": ("llama", {"method": "gptq"}),
    "balanced": ("llama", {"method": "qep,gptq,descent"}),
    "share": ("llama", {"method": "qep:share=0.5,gptq"}),
    "weighed": ("llama", {"method": "fisher,qep,gptq"}),
    "tuned": ("llama", {"method": "gptq,signround:steps=2"}),
    "head": ("llama", {"method": "gptq", "lm_head": True}),
    "awq": ("llama", {"method": "awq,gptq", "format": "awq", "sym": False}),
    "static": ("qwen2", {"method": "smoothquant,gptq", "bits": 8, "act_bits": 8, "act": "tensor"}),
    "cache": ("qwen3", {"method": "qep,gptq", "kv_bits": 8}),
    "window": ("gemma3_text", {"method": "qep,gptq"}),
    "shared keys": ("gemma4_text", {"method": "qep,gptq"}),
    "delta net": ("qwen3_5_text", {"method": "gptq", "on_misfit": "skip"}),
    "experts": ("qwen3_moe", {"method": "qep,gptq"}),
}


@pytest.fixture
def calib(tmp_path):
    (tmp_path / "text.txt").write_text(make_prose(2000))
    return tmp_path / "text.txt"


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_do_not_depend_on_what_stays_suspended(case, tmp_path, calib, monkeypatch):
    family, how = CASES[case]
    FAMILIES[family].save(tmp_path / "src")
    monkeypatch.setattr("llmq.pipeline.entering.BATCH_TOKENS", 2 * SEQ_LEN)  # three batches
    recipe = Recipe(group_size="channel" if "act" in how else 16, calib=str(calib), samples=6, seq_len=SEQ_LEN, **how)
    plan = prepare(str(tmp_path / "src"), recipe)
    written = {}
    for alive in (None, 2, 0):
        out = tmp_path / f"{alive}"
        quantize(dataclasses.replace(plan, alive=alive), out, check=False)
        written[alive] = [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())]
    assert written[None] == written[2] == written[0]


@pytest.mark.parametrize(("alive", "forwards"), [(None, 3), (2, 3 + 4), (1, 3 + 8), (0, 3 + 12)])
def test_what_does_not_wait_runs_anew(alive, forwards, tiny_llama):
    """To each of four sites, and to the end: of a batch that does not wait four more forwards begin."""
    block = tiny_llama().model.layers[0]
    cos_sin = torch.ones(1, 8, 16), torch.zeros(1, 8, 16)
    began = []
    block.register_forward_pre_hook(lambda *_: began.append(1))
    sites = [Site((n,)) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]
    hidden = [torch.randn(1, 8, 64) for _ in range(3)]
    with torch.no_grad(), Lanes(block, sites, hidden, [((), {"position_embeddings": cos_sin})] * 3, alive) as lanes:
        for _ in sites:
            assert [len(x) for x in lanes.advance()] == [8] * 3
            assert sum(map(bool, lanes._lanes)) == min(3 if alive is None else alive, 3)
        assert len(list(lanes.finish())) == 3
    assert len(began) == forwards
