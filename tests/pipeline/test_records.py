"""quantization.json tells the truth: errors and checksums are those of the files, found again from files alone."""

import gc
import hashlib
import json
import weakref
from functools import partial

import pytest
import torch
from _families import FAMILIES
from _ggml import values_of
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from llmq.checkpoint import Source
from llmq.checkpoint.digest import holds, sealed
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.errors import LlmqError
from llmq.gguf.architecture import architecture
from llmq.gguf.reader import GgufFile
from llmq.granularity import PerTensor
from llmq.model.folding import Fold, floats_of
from llmq.model.pretrained import blank_model, model_config
from llmq.pipeline import block, solving
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.stats import Hessian
from llmq.types import Producer

BASE = {"samples": 8, "seq_len": 64, "group_size": 32, "dtype": "float32", "bits": 3}
W8A8 = {"bits": 8, "act_bits": 8, "group_size": None}


@pytest.fixture
def text(tmp_path, prose):
    file = tmp_path / "calibration.txt"
    file.write_text(prose(2000))
    return str(file)


@pytest.fixture
def hessians(monkeypatch):
    """H of every linear as it was solved, by full name, caught on its way."""
    caught, number = {}, [str]
    original = solving.solve

    def solve(method, targets, stats, team):
        if Hessian in stats:
            H_KK = stats[Hessian].mean().clone()
            caught.update({number[0](n): H_KK for n in targets})
        return original(method, targets, stats, team)

    def quantize_block(plan, i, *rest):
        number[0] = partial(plan.skeleton.full_name, i)
        return block.quantize_block(plan, i, *rest)

    monkeypatch.setattr("llmq.pipeline.solving.solve", solve)
    monkeypatch.setattr("llmq.pipeline.run.quantize_block", quantize_block)
    return caught


def made(folder, out, **options):
    quantize(prepare(str(folder), Recipe(**(BASE | options)), "cpu"), out)
    return json.loads((out / "quantization.json").read_text())


def solved(out):
    """Return every quantized linear of a checkpoint, as its format reads it."""
    source = Source(out)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    return ((name, packed.qtensor(name)) for name in packed.linears)


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def check(folder, out, record, hessians=None):
    """Hold a record against the files of the checkpoint and the float one that it was made of."""
    floats, seen = floats_of(Source(folder), record, record["linears"], "the record"), set()
    for name, q in solved(out):
        line, one = record["linears"][name], isinstance(q.grid.granularity, PerTensor)
        stored = {"codes": q.codes, "scale": q.params.scale[:1] if one else q.params.scale}
        stored["zero"] = (q.params.zero[:1] if one else q.params.zero).int()
        stored |= {} if q.g_idx is None else {"g_idx": q.g_idx.int()}
        stored |= {} if q.input is None else {"input": q.input.scale}
        assert line["sha256"] == {k: sha256(t) for k, t in stored.items()}, name
        tied = name == "lm_head" and "lm_head.weight" not in floats.source
        W_NK = floats.get("model.embed_tokens.weight" if tied else f"{name}.weight").double()
        E_NK = q.dequantize().double() - W_NK
        assert line["weight_error"] == pytest.approx((E_NK.square().sum() / W_NK.square().sum()).item(), rel=1e-5)
        H_KK = (hessians or {}).get(name)
        assert (H_KK is None) == ("output_error" not in line)
        if H_KK is not None:
            error, whole = (((X @ H_KK.double()) * X).sum().item() for X in (E_NK, W_NK))
            assert line["output_error"] == pytest.approx(error / whole, rel=1e-5)
        seen.add(name)
    assert seen == set(record["linears"])
    source = Source(out)
    assert record["tensors"] == {n: sha256(source.get(n)) for n in source.names()}
    for name in set(source.names()) & set(floats.source.names()) - set(record["tuned"]):
        if name.rpartition(".")[0] not in seen:
            assert torch.equal(source.get(name), floats.get(name)), name
    assert record["files"] == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if p.name != "quantization.json"
    }
    assert holds(record)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"format": "gptq"}),
        ("rtn", {"group_size": "tensor", "bits": 8, "format": "compressed-tensors"}),
        ("gptq", {"sym": False, "format": "compressed-tensors"}),
        ("gptq:desc_act=true,descent", {"format": "gptq"}),
        ("qep,gptq,descent", {"bits": 2, "format": "gptq", "lm_head": True, "dtype": "auto"}),
        ("awq,gptq", {"bits": 4, "sym": False, "format": "awq"}),
        ("awq,smoothquant,rtn", {"skip": (r"0\.self_attn\.k_proj", "down_proj"), "format": "compressed-tensors"}),
        ("smoothquant,rtn", W8A8),
        ("migrate,qep,gptq", {**W8A8, "act": "tensor"}),
        ("rotate:residual=true:untie=true,gptq", {"format": "gptq"}),
        ("rotate,awq,rtn", {"format": "gptq", "skip": ("v_proj",)}),
        ("qep:alpha=0.2,rtn,signround:steps=20:check=4", {"bits": 2, "samples": 32, "format": "gptq"}),
        ("gptq,distill:epochs=1:lr=0.01:norm_lr=0.01", {"bits": 2, "format": "gptq", "lm_head": True}),
        ("fisher,qep,gptq,descent", {"format": "gptq"}),
        ("gptq", {"target_bpw": 4.5, "format": "compressed-tensors"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_the_record_is_found_again_from_the_files(tiny_checkpoint, tmp_path, text, hessians, method, options):
    folder = tiny_checkpoint(dtype=torch.bfloat16, tie_word_embeddings=True)
    record = made(folder, tmp_path / "out", method=method, calib=text, **options)
    check(folder, tmp_path / "out", record, hessians)
    if "signround" in method:  # it moved codes, and so errors
        assert any(line["signround"] < 1 for line in record["linears"].values())
    assert all(line["held_kl"] < line["held_kl_before"] for line in record["finished"].values())


def test_biases_and_mixed_dtypes_are_written_as_they_run(tmp_path, tokenizer_bos, text, hessians):
    """A Qwen2, whose biases absorb folds, with norms in float32 among bfloat16, and computed in bfloat16 too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes), dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
        if "norm" in name or "up_proj" in name:
            p.data = p.data.float() * 1.001  # no bfloat16 numbers
    model.save_pretrained(tmp_path / "float")
    tokenizer_bos.save_pretrained(tmp_path / "float")
    for i, (method, dtype) in enumerate([("awq,gptq", "float32"), ("rotate,rtn", "float32"), ("gptq", "bfloat16")]):
        out = tmp_path / f"out{i}"
        record = made(tmp_path / "float", out, method=method, calib=text, dtype=dtype, skip=("k_proj",))
        check(tmp_path / "float", out, record, hessians)
        hessians.clear()
        dtypes = {n: Source(out).headers()[n][0] for n in Source(out).names()}
        assert dtypes["model.layers.0.input_layernorm.weight"] == "F32"
        assert dtypes["model.layers.0.self_attn.v_proj.bias"] == "BF16"


@pytest.mark.parametrize(
    ("kind", "method", "said"),
    [("phi3", "awq,rtn", "rows"), ("gemma3_text", "smoothquant,gptq", "gain"), ("cohere", "awq,rtn", "scale"),
     ("gpt_neox", "rotate,migrate,rtn", "rows"), ("qwen3_5_text", "smoothquant,rtn", "gain"),
     ("qwen3_moe", "awq,rtn", "scale")],
)  # fmt: skip
def test_other_families_fold_into_what_was_found(kind, method, said, tmp_path, text, hessians):
    """Rows of a fused linear, gains stored as 1 + w, heads that are interleaved, one norm before five linears."""
    FAMILIES[kind].save(tmp_path / "float")
    record = made(
        tmp_path / "float", tmp_path / "out", method=method, calib=text, seq_len=32, format="compressed-tensors"
    )
    check(tmp_path / "float", tmp_path / "out", record, hessians)
    folds = [entry for entry in record["transforms"] if "scale" in entry]
    assert said in {k for f in folds for k in f}
    assert [f["block"] for f in folds] == sorted(f["block"] for f in folds) and {f["block"] for f in folds} == {0, 1}


@pytest.mark.parametrize("step", ["awq", "rotate"])
def test_hidden_states_see_what_is_written(tiny_checkpoint, tmp_path, text, monkeypatch, step):
    """Skipped linears are rounded to bfloat16 before the blocks behind them are calibrated."""
    ran, original = {}, block._solve

    def watched(b, *rest):
        ran.update({b.full(n): t.clone() for n, t in b.module.state_dict().items()})
        return original(b, *rest)

    monkeypatch.setattr(block, "_solve", watched)
    out = tmp_path / "out"
    made(tiny_checkpoint(dtype=torch.bfloat16), out, method=f"{step},rtn", calib=text, skip=("v_proj", "down_proj"))
    written = Source(out)
    floats = [n for n in ran if n in written]
    assert len(floats) == 8 and any("v_proj" in n for n in floats)
    assert all(torch.equal(ran[n], written.get(n).float()) for n in floats)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Q4_K_M", {"method": "rtn"}),
        ("Q8_0", {"method": "qep,gptq,descent", "split_max_size": "1M"}),
        ("Q3_K_M", {"method": "smoothquant,gptq"}),
        ("Q4_0", {"method": "rotate:residual=true:untie=true,gptq"}),
    ],
)
def test_the_record_in_a_gguf_file_is_found_again(tiny_checkpoint, tmp_path, text, hessians, kind, options):
    sizes = {"hidden_size": 256, "intermediate_size": 768, "tie_word_embeddings": True}
    folder, out = tiny_checkpoint(dtype=torch.bfloat16, **sizes), tmp_path / "out.gguf"
    recipe = Recipe(format="gguf", type=kind, samples=8, seq_len=64, calib=text, **options)
    summary = quantize(prepare(str(folder), recipe, "cpu"), out)
    files = [GgufFile(out.parent / name) for name in summary["files"]]
    record, tensors = files[0].report(), {n: t for f in files for n, t in f.tensors.items()}
    assert (len(files) > 1) == ("split_max_size" in options) and holds(record)
    assert record["tensors"] == {n: hashlib.sha256(t.data.tobytes()).hexdigest() for n, t in tensors.items()}

    floats = floats_of(Source(folder), record, record["linears"], "the record")
    arch = architecture(AutoConfig.from_pretrained(folder))
    for name, line in record["linears"].items():
        t = tensors[arch.tensor(f"{name}.weight") or "output.weight"]
        Q_NK = values_of(t.data, t.tensor_type.name)
        rows = arch.rows(f"{name}.weight")
        Q_NK = Q_NK if rows is None else Q_NK[torch.argsort(rows)]
        assert line["sha256"] == {"values": sha256(Q_NK)}, name
        W_NK = floats.get(f"{name}.weight").double()
        E_NK = Q_NK.double() - W_NK
        assert line["weight_error"] == pytest.approx((E_NK.square().sum() / W_NK.square().sum()).item(), rel=1e-5)
        assert ("output_error" in line) == (name in hessians)
        if name in hessians:
            error, whole = (((X @ hessians[name].double()) * X).sum().item() for X in (E_NK, W_NK))
            assert line["output_error"] == pytest.approx(error / whole, rel=1e-5)
    assert record["linears"].keys() == {*floats.quantized} and len(record["linears"]) >= 15


def test_a_record_that_was_changed_does_not_hold():
    record = sealed({"a": 1, "b": ["\u00e9", 0.1]})
    assert holds(json.loads(json.dumps(record)))
    assert not holds(record | {"a": 2}) and not holds({"a": 1})


SHAPES = {"c.weight": [64], "d.weight": [32, 8]}


@pytest.mark.parametrize(
    ("producer", "said"),
    [(Producer("c"), {}), (Producer("c", gain="1 + w"), {"gain": "1 + w"}),
     (Producer("d", (4, 5, 6, 4, 5, 6, 20, 0)), {"rows": [[4, 3], [4, 3], [20, 1], [0, 1]]})],
)  # fmt: skip
def test_a_fold_is_written_and_read(producer, said):
    by = Fold("awq", 3, ("a", "b"), producer, torch.rand(8))
    entry = json.loads(json.dumps(by.to_json()))
    assert entry == {"step": "awq", "block": 3, "linears": ["a", "b"], "producer": producer.module} | said | {
        "scale": entry["scale"]
    }
    again = Fold.from_json(entry, "here", SHAPES)
    assert torch.equal(again.scale, by.scale) and again.to_json() == by.to_json()
    for change in (
        {"scale": "%"}, {"scale": "AAA="}, {"linears": 4}, {"gain": 16}, {"gain": "w2"}, {"producer": None},
        {"rows": 1}, {"rows": [[0, 10**12]]}, {"rows": [[-1, 8]]}, {"rows": [[0, 4], 4]}, {"rows": [["0", 8]]},
        {"block": "3"},
    ):  # fmt: skip
        with pytest.raises(LlmqError, match="here"):
            Fold.from_json(by.to_json() | change, "here", SHAPES)


def test_a_fold_of_an_older_record_says_rows_by_heads():
    entry = Fold("awq", 3, ("a",), Producer("d"), torch.rand(64)).to_json() | {"head_dim": 16}
    heads = [range(16), range(16), range(16, 32), range(16, 32)]
    assert Fold.from_json(entry, "here", SHAPES).producer.rows == tuple(row for head in heads for row in head)
    assert Fold.from_json(entry | {"producer": "c"}, "here", SHAPES).producer.rows is None


def test_nothing_that_a_record_names_is_imported(tiny_checkpoint):
    for step in ("os.path:x=1", "gptq"):
        with pytest.raises(LlmqError, match="no rotation of llmq's own"):
            floats_of(Source(tiny_checkpoint()), {"transforms": [{"step": step}]}, {}, "here")


@pytest.mark.parametrize(
    "change",
    [{"producer": "model.norms"}, {"linears": ("model.layers.0.mlp.down_proj",)}, {"scale": torch.ones(63)},
     {"producer": "model.layers.0.self_attn.v_proj"}, {"linears": ("model.norm",)}, {"rows": (*range(63), 64)}],
)  # fmt: skip
def test_a_fold_of_another_model_is_refused(tiny_checkpoint, change):
    base = {"linears": ("model.layers.0.mlp.up_proj",), "scale": torch.ones(64), "rows": None}
    base |= {"producer": "model.layers.0.post_attention_layernorm"}

    def entry(linears, scale, rows, producer):
        return Fold("awq", 0, linears, Producer(producer, rows), scale).to_json()

    source = Source(tiny_checkpoint())
    floats_of(source, {"transforms": [entry(**base)]}, {}, "here").get("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(LlmqError, match=r"here, transforms\[0\] names other modules"):
        floats_of(source, {"transforms": [entry(**(base | change))]}, {}, "here")
    with pytest.raises(LlmqError, match="is no object"):
        floats_of(source, {"transforms": [4]}, {}, "here")


@pytest.mark.parametrize("method", ["gptq,descent", "qep,gptq,signround:steps=1"])
def test_no_float_weight_outlives_its_site_but_for_tuners(tiny_checkpoint, tmp_path, text, monkeypatch, method):
    alive, seen, original, solved = [], [], solving._placed, block.solve_stage

    def placed(at, name, answer, W_NK, *more):
        alive.append((at.number, weakref.ref(W_NK)))
        return original(at, name, answer, W_NK, *more)

    def solve_stage(at, *args):
        gc.collect()
        seen.append(sum(ref() is not None for number, ref in alive if number == at.number))
        return solved(at, *args)

    monkeypatch.setattr(solving, "_placed", placed)
    monkeypatch.setattr(block, "solve_stage", solve_stage)
    made(tiny_checkpoint(), tmp_path / "out", method=method, calib=text)
    assert len(seen) == 8  # q, k and v; o; gate and up; down: of two blocks
    assert seen == ([0, 3, 4, 6] * 2 if "signround" in method else [0] * 8)
