"""Two hundred single bits flipped, anywhere in what llmq writes: every one is found, most of them twice.

Checksums find all. What the checks of content find without any is counted too: that is all that can be said of a
checkpoint that holds none.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from llmq.checkpoint.place import AFTERWARDS
from llmq.gguf import seal
from llmq.gguf.reader import GgufFile
from llmq.guard.reading import tensor_entries
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.verify import record, verify

FLIPS = 200
RECIPES = {
    "gptq": {"method": "gptq:desc_act=true", "format": "gptq:desc_act=true", "group_size": 32},
    "awq": {"method": "rtn", "format": "awq", "group_size": 32, "sym": False},
    "compressed-tensors": {"method": "rtn", "format": "compressed-tensors", "bits": 3, "group_size": 32, "sym": False},
    "gguf": {"method": "rtn", "format": "gguf:pre=gpt-2", "type": "Q4_0"},
}
KINDS = {
    "qweight": "codes", "weight_packed": "codes", "scales": "scales", "weight_scale": "scales", "qzeros": "zeros",
    "weight_zero_point": "zeros", "g_idx": "g_idx", "weight_shape": "shapes",
}  # fmt: skip
Place = tuple[str, Path, int, int]  # kind, file, first byte, bytes


def places(out: Path) -> list[Place]:
    """Return what a bit can be flipped in: tensors by kind, headers, and every other file."""
    if out.is_file():
        tensors = [(t.data_offset, t.n_bytes, t.tensor_type.name) for t in GgufFile(out).tensors.values()]
        kinds = {"Q4_0": "codes", "F32": "floats"}
        found = [(kinds.get(kind, "floats"), out, int(at), int(n)) for at, n, kind in tensors]
        return [*found, ("headers", out, 0, min(at for _, _, at, _ in found))]
    found = []
    for file in sorted(out.iterdir()):
        if file.suffix != ".safetensors":
            kind = {"config.json": "config", "tokenizer.json": "tokenizer", "quantization.json": "record"}.get(
                file.name
            )
            found.append((kind or "other files", file, 0, file.stat().st_size))
            continue
        entries = tensor_entries(file).values()
        found += [(KINDS.get(e.name.rpartition(".")[2], "floats"), file, e.start, e.nbytes) for e in entries]
        found.append(("headers", file, 0, min(e.start for e in entries)))
    return found


def flip_and_look(outs: list[Path], flips: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Flip bits one at a time, the kinds in turn, verify each; return the flips by kind and those not found."""
    draw, made, missed = random.Random(seed), Counter[str](), []
    by_kind = [
        {k: [p for p in found if p[0] == k] for k in sorted({p[0] for p in found})} for found in map(places, outs)
    ]
    for i in range(flips):
        out, kinds = outs[i % len(outs)], by_kind[i % len(outs)]
        kind = list(kinds)[(i // len(outs)) % len(kinds)]
        _, file, start, nbytes = draw.choice(kinds[kind])
        at, bit = start + draw.randrange(nbytes), draw.randrange(8)
        good = file.read_bytes()
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        made[kind] += 1
        if verify(out).passed:
            missed.append(f"{kind}: bit {bit} of byte {at} of {file}")
        file.write_bytes(good)
    return made, missed


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_llama, tokenizer_bos):
    """The outputs of `RECIPES` for a tiny model of one block, which `verify` passes."""
    folder = tmp_path_factory.mktemp("flips")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "float")
    tokenizer_bos.save_pretrained(folder / "float")
    (folder / "text.txt").write_text("the first of many words " * 400)
    calibration = {"calib": str(folder / "text.txt"), "samples": 2, "seq_len": 32}
    outs = []
    for name, options in RECIPES.items():
        recipe = Recipe.load(None, options | (calibration if options["method"] != "rtn" else {}))
        outs.append(folder / (f"{name}.gguf" if name == "gguf" else name))
        quantize(prepare(str(folder / "float"), recipe), outs[-1])
        assert verify(outs[-1]).passed
    return outs


def test_every_flipped_bit_is_found(written):
    made, missed = flip_and_look(written, FLIPS, seed=0)
    assert not missed
    assert made.total() == FLIPS and len(made) == 11


def test_a_file_that_has_come_is_found_but_for_what_llmq_adds_itself(written, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(written[0], out)
    for name in AFTERWARDS:
        (out / name).write_text("{}")
    assert verify(out).passed
    (out / "notes.txt").write_text("mine")
    assert verify(out).failures == ["notes.txt is not among the files that were written"]


def test_without_checksums_what_makes_no_sense_is_still_found(written, monkeypatch):
    """Half of the headers and configs, exponents of scales: not codes, of which each is as good as another."""
    monkeypatch.setattr(record, "read_record", lambda folder, report: {})
    monkeypatch.setattr(record, "checked", lambda found, where, report: {})
    monkeypatch.setattr(seal, "broken", lambda files: [])
    made, missed = flip_and_look(written, 60, seed=1)
    assert 10 < made.total() - len(missed) < 50
    assert not [m for m in missed if m.startswith(("g_idx", "shapes"))]
