"""Twenty-two packers that are wrong, each in one way, through `quantize`: every one is found, and no OUT appears."""

from pathlib import Path

import pytest
import torch

from llmq.errors import LlmqError
from llmq.formats.awq import AWQ
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.gptq import GPTQ
from llmq.gguf.architecture import Architecture
from llmq.grids.q4_0 import Q4_0
from llmq.grids.q4_1 import Q4_1
from llmq.grids.q8_0 import Q8_0
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe

FLOAT = Path(__file__).parents[1] / "golden" / "float"


def edit(local, change):
    """Return a wrapper of a format's `pack` that changes one of the tensors it returns."""

    def wrap(pack):
        def wrong(self, q, spec):
            tensors = pack(self, q, spec)
            return tensors | {local: change(tensors[local]).contiguous()}

        return wrong

    return wrap


def before(change):
    """Return a wrapper of a format's `pack` that packs something else than what was solved."""

    def wrap(pack):
        return lambda self, q, spec: pack(self, change(q), spec)

    return wrap


def solved(**changes):
    """Return a change of a QTensor: of its codes, scale, zero or g_idx."""

    def change(q):
        params = type(q.params)(
            changes.get("scale", lambda x: x)(q.params.scale), changes.get("zero", lambda x: x)(q.params.zero)
        )
        g_idx = changes["g_idx"](q.g_idx) if "g_idx" in changes else q.g_idx
        return type(q)(changes.get("codes", lambda x: x)(q.codes), params, q.grid, g_idx, q.input)

    return change


def neighbours(pack):
    """Every linear gets the tensors of the one that was packed before it, where they have its shapes."""
    last = {}

    def wrong(self, q, spec):
        tensors = pack(self, q, spec)
        shapes = tuple(t.shape for t in tensors.values())
        found = last.get(shapes, tensors)
        last[shapes] = tensors
        return found

    return wrong


def swap_nibbles(words):
    """Return int32 words with the two nibbles of every byte exchanged."""
    raw = words.view(torch.uint8)
    return ((raw >> 4) | (raw << 4)).view(torch.int32)


def straddle(words):
    """Return 3-bit words whose tenth code loses the bit that lies in the next word."""
    return torch.cat([words[:1], words[1:] & ~1])


def version_two(pack):
    """Write zeros as v2 does, under a config that says v1."""
    return lambda self, q, spec: pack(GPTQ("gptq_v2"), q, spec)


GPTQ4 = {"format": "gptq", "group_size": 32}
ASYM = {"format": "gptq:checkpoint_format=gptq_v2", "group_size": 32, "sym": False}
ORDER = {"format": "gptq:desc_act=true", "group_size": 32, "method": "gptq:desc_act=true"}
AWQ4 = {"format": "awq", "group_size": 32, "sym": False}
CT4 = {"format": "compressed-tensors", "group_size": 32}
CT5 = CT4 | {"sym": False, "bits": 5}
W8A8 = {"format": "compressed-tensors", "group_size": "channel", "bits": 8, "act_bits": 8}


def gguf(kind):
    return {"format": "gguf:pre=gpt-2", "type": kind}


WRONG = {
    "zeros off by one": (ASYM, GPTQ, "pack", before(solved(zero=lambda z: (z + 1) % 16))),
    "v1 written as v2": (GPTQ4, GPTQ, "pack", version_two),
    "rows reversed": (GPTQ4, GPTQ, "pack", before(solved(codes=lambda c: c.flip(0)))),
    "columns reversed": (AWQ4, AWQ, "pack", before(solved(codes=lambda c: c.flip(1)))),
    "nibbles swapped": (GPTQ4, GPTQ, "pack", edit("qweight", swap_nibbles)),
    "AWQ in the natural order": (AWQ4, AWQ, "pack", edit("qweight", lambda w: w[:, torch.arange(w.shape[1]) ^ 1])),
    "scales in the other direction": (AWQ4, AWQ, "pack", edit("scales", lambda s: s.T.reshape(s.shape))),
    "scales reversed": (CT4, CompressedTensors, "pack", edit("weight_scale", lambda s: s.flip(0))),
    "groups shifted": (GPTQ4, GPTQ, "pack", before(solved(scale=lambda s: s.roll(1, 1)))),
    "g_idx of other columns": (ORDER, GPTQ, "pack", edit("g_idx", lambda g: g.roll(1))),
    "g_idx left out": (ORDER, GPTQ, "pack", edit("g_idx", lambda g: torch.arange(len(g), dtype=g.dtype) // 32)),
    "the sign bit": (W8A8, CompressedTensors, "pack", edit("weight", lambda w: w ^ -128)),
    "the wrong half": (CT5, CompressedTensors, "pack", before(solved(codes=lambda c: (c + 16) % 32))),
    "zeros of the wrong half": (CT5, CompressedTensors, "pack", before(solved(zero=lambda z: (z + 16) % 32))),
    "a straddling code cut": (GPTQ4 | {"bits": 3}, GPTQ, "pack", edit("qweight", straddle)),
    "scales rounded to bfloat16": (GPTQ4, GPTQ, "pack", edit("scales", lambda s: s.bfloat16().half())),
    "scales beyond float16": (GPTQ4, GPTQ, "pack", edit("scales", lambda s: (s.float() * 1e9).half())),
    "tensors of another linear": (GPTQ4, GPTQ, "pack", neighbours),
    "ggml's rows not reordered": (gguf("Q8_0"), Architecture, "rows", lambda _: lambda self, name: None),
    "ggml's nibbles swapped": (
        gguf("Q4_0"),
        Q4_0,
        "to_bytes",
        lambda pack: lambda self, c, p: pack(self, c.flip(1), p),
    ),
    "ggml's scales of another block": (
        gguf("Q8_0"),
        Q8_0,
        "to_bytes",
        lambda f: lambda self, c, p: f(self, c, p).roll(2, 0),
    ),
    "ggml's minima negated": (
        gguf("Q4_1"),
        Q4_1,
        "to_bytes",
        lambda f: lambda self, c, p: f(self, c, type(p)(p.scale, p.offset, p.d, -p.dmin)),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_packer_is_found_before_anything_is_written(what, monkeypatch, tmp_path, prose):
    options, owner, name, wrong = WRONG[what]
    (tmp_path / "text.txt").write_text(prose(600))
    calibration = {"calib": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 32}
    recipe = Recipe.load(None, {"method": "rtn"} | options | (calibration if options.get("method") else {}))
    plan = prepare(str(FLOAT), recipe)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    out = tmp_path / ("out.gguf" if recipe.gguf else "out")
    with pytest.raises(LlmqError, match="is not right"):
        quantize(plan, out)
    assert not out.exists()
