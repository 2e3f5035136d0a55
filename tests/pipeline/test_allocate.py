"""Bits under a budget: the choice is near the best there is, fits, and is what gets written."""

import itertools
import json
import random

import pytest
import torch
from _families import FAMILIES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmq import calibration
from llmq.calibration.collect import collect
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import Calibration, Probe
from llmq.checkpoint.batches import Batches
from llmq.gguf.reader import GgufFile
from llmq.histogram import Histogram
from llmq.loading import load_tokenizer
from llmq.model.ends import embed
from llmq.pipeline.allocate import Choice, _divergence, _joined, costs, spend
from llmq.pipeline.plan import outline, prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.stats import Hessian
from llmq.types import LinearSpec, LlmqError


def units(seed, count=5):
    draw = random.Random(seed)
    made = {}
    for i in range(count):
        weights, sensitivity = draw.choice([100, 200, 400]), draw.lognormvariate(0, 2)
        made[(f"site{i}",)] = [
            Choice(f"bits={b}", weights * b, sensitivity * 4.0**-b * draw.uniform(0.7, 1.4)) for b in (2, 3, 4, 8)
        ]
    return made


def best(choices, budget):
    combinations = itertools.product(*choices.values())
    return min(sum(c.error for c in chosen) for chosen in combinations if sum(c.size for c in chosen) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_errs_less_with_one_upgrade_less_to_spend(seed):
    choices = units(seed)
    least = sum(min(c.size for c in unit) for unit in choices.values())
    step = max(b.size - a.size for unit in choices.values() for a, b in itertools.combinations(unit, 2))
    for budget in (least + step, 1.9 * least + step):
        chosen = spend(choices, budget)
        assert sum(c.size for c in chosen.values()) <= budget
        assert sum(c.error for c in chosen.values()) <= best(choices, budget - step) + 1e-12


def test_a_choice_that_costs_more_and_errs_more_is_never_made():
    choices = {("a",): [Choice("a", 200, 1.0), Choice("b", 300, 1.5), Choice("c", 400, 0.5)]}
    assert spend(choices, 350)[("a",)].changes == "a"
    assert spend(choices, 400)[("a",)].changes == "c"


def test_a_budget_below_the_fewest_bits_is_refused_before_any_work(tiny_checkpoint):
    recipe = Recipe(method="rtn", target_bpw=3.4, group_size=32, calib="nothing.txt")
    with pytest.raises(LlmqError, match=r"--target-bpw 3.4 is too low: .* takes \d\.\d+ bits"):
        prepare(str(tiny_checkpoint()), recipe, "cpu")


def test_a_head_that_is_solved_too_counts_in_the_budget(tiny_checkpoint, tmp_path, prose):
    text = tmp_path / "calibration.txt"
    text.write_text(prose(2000))
    options = {"method": "rtn", "group_size": 32, "samples": 8, "seq_len": 32, "calib": str(text)}
    plan = prepare(str(tiny_checkpoint()), Recipe(**options, bits=8, target_bpw=6.0, lm_head=True), "cpu")
    summary = quantize(plan, tmp_path / "out")
    assert summary["linears"]["lm_head"]["bits"] == 8
    assert 5.5 < summary["size"]["bits_per_weight"] <= 6.0


def test_the_written_model_fits_the_budget_with_sites_alike(tiny_checkpoint, tmp_path, prose):
    text = tmp_path / "calibration.txt"
    text.write_text(prose(2000))
    recipe = Recipe(
        method="gptq", target_bpw=5.0, group_size=32, samples=8, seq_len=32, calib=str(text), dtype="float32"
    )
    plan = prepare(str(tiny_checkpoint()), recipe, "cpu")
    assert plan.warnings and not any("not quantized alike" in w for w in plan.warnings)
    assert any("weights of 3, 5, 6 bits" in w for w in plan.warnings)
    assert any("8-bit weights" in w for w in plan.warnings), "all that a linear may become, however few there are"
    summary = quantize(plan, tmp_path / "out")
    bits = {n: line["bits"] for n, line in summary["linears"].items()}
    assert summary["size"]["bits_per_weight"] <= 5.0
    assert len(set(bits.values())) > 1 and set(bits.values()) <= {3, 4, 5, 6, 8}
    for block in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{block}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert bits[f"{block}.mlp.gate_proj"] == bits[f"{block}.mlp.up_proj"]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == len(set(bits.values()))
    again = quantize(prepare(str(tiny_checkpoint()), Recipe(**summary["recipe"]), "cpu"), tmp_path / "again")
    assert {n: line["bits"] for n, line in again["linears"].items()} == bits, "the recipe repeats the run"


def test_costs_are_the_divergence_that_rounding_a_site_adds(tiny_checkpoint, tmp_path, prose):
    text = tmp_path / "calibration.txt"
    text.write_text(prose(2000))
    folder = tiny_checkpoint(initializer_range=0.15)
    plan = prepare(str(folder), Recipe(method="rtn", target_bpw=5.0, group_size=32, samples=4, seq_len=64,
                                      calib=str(text), dtype="float32"), "cpu")  # fmt: skip
    tokens = calibration.tokens(str(text), load_tokenizer(str(folder)), 64, 64, 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        (hidden, short), (calls, call) = embed(plan.skeleton, [tokens, tokens[:1, :8]], torch.device("cpu"))
        entered = Batches(tmp_path / "0", "hidden", range(1)).filled([hidden])
        dealt = Dealt.of([tokens.numel()])
        state = Calibration(entered, calls=[calls], ids=tokens, probe=Probe(short, call), dealt=dealt)
        found = costs(plan, state, lambda *_: None)
        assert len(found) == 2 * 4
        want, ratios = model(tokens).logits.log_softmax(-1), []
        for names, choices in found.items():
            floats = {n: model.get_submodule(n).weight.data.clone() for n in names}
            for c in choices[:2]:  # 3 and 4 bits
                for n, W in floats.items():
                    grid = plan.method.possible(plan.linears[n])[c.changes].scheme.weight
                    params = grid.fit(W).columns(W.shape[1])
                    model.get_submodule(n).weight.data = grid.decode(grid.nearest(W, params), params)
                log_p = model(tokens).logits.log_softmax(-1)
                ratios.append(c.error / (want.exp() * (want - log_p)).sum(-1).mean().item())
            for n, W in floats.items():
                model.get_submodule(n).weight.data = W
    assert min(ratios) > 0.5 and max(ratios) < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gptq"}, "gptq"),
        ({"format": "awq"}, "awq"),
        ({"bits": 8, "act_bits": 8}, "target_bpw"),
        ({"bit_choices": "4,eight"}, "bit_choices"),
        ({"bit_choices": "4,9"}, "bit_choices"),
        ({"choices": "nvfp4,mixed"}, "choices are schemes .* not 'mixed'"),
        ({"choices": "float"}, "leaves everything float"),
        ({"choices": "nvfp4,fp9"}, "'fp9' is none of llmq's grids"),
        ({"choices": "nvfp4,fp8", "bit_choices": "4,8"}, "--bit-choices means nothing here"),
        ({"choices": "nvfp4a16,int:bits=4:group=48"}, "group size 48 does not divide"),
    ],
    ids=str,
)
def test_what_cannot_be_mixed_is_refused_before_any_work(tiny_checkpoint, options, message):
    with pytest.raises(LlmqError, match=message):
        prepare(str(tiny_checkpoint()), Recipe(**({"target_bpw": 4.5} | options)), "cpu")


@pytest.mark.parametrize(
    ("target", "formats", "left"),
    [(7.5, {"nvfp4-pack-quantized", "float-quantized"}, False), (9.5, {"float-quantized"}, True)],
)
def test_a_budget_chooses_among_formats_with_their_inputs(tiny_checkpoint, tmp_path, prose, target, formats, left):
    (text := tmp_path / "calibration.txt").write_text(prose(1000))
    options = {"method": "rtn", "samples": 4, "seq_len": 32, "calib": str(text), "dtype": "float32"}
    folder = tiny_checkpoint(dtype=torch.bfloat16)
    recipe = Recipe(**options, target_bpw=target, choices="nvfp4,fp8,float")
    summary = quantize(prepare(str(folder), recipe, "cpu"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    groups = {g["format"]: g for g in config["config_groups"].values()}
    assert set(groups) == formats and all(g["input_activations"] for g in groups.values())
    tensors = {n: t for n, t in load_file(tmp_path / "out/model.safetensors").items() if "_proj." in n}
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if "_proj." in n}
    assert 8 * sum(t.nbytes for t in tensors.values()) / sum(t.numel() for t in weights.values()) <= target
    floats = [n for n in weights if tensors.get(n, torch.empty(0)).dtype == torch.bfloat16]
    assert bool(floats) == left and all(n.removesuffix(".weight") in config["ignore"] for n in floats)
    assert all(torch.equal(tensors[n], weights[n]) for n in floats)
    again = quantize(prepare(str(folder), Recipe(**summary["recipe"]), "cpu"), tmp_path / "again")
    bits = [{n: line["bits"] for n, line in record["linears"].items()} for record in (summary, again)]
    assert bits[0] == bits[1], "the recipe repeats the run"


def test_a_budget_chooses_types_of_ggml_tensor_by_tensor(tiny_checkpoint, tmp_path, prose):
    (text := tmp_path / "calibration.txt").write_text(prose(1000))
    options = {"format": "gguf", "method": "rtn", "samples": 4, "seq_len": 32, "calib": str(text), "dtype": "float32"}
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    plan = prepare(str(folder), Recipe(**options, type="Q4_0", target_bpw=6.0), "cpu")
    names = [n for n in plan.linears if n.endswith("up_proj")]
    assert list(plan.candidates(plan.linears[names[0]])) == ["type=Q4_0", "type=Q5_0", "type=Q5_1", "type=Q8_0"]
    assert all("_proj" not in w and "blk." not in w for w in plan.warnings), "of the mixture nothing is told"
    summary = quantize(plan, out)
    tensors = {n: t for n, t in GgufFile(out).tensors.items() if n.startswith("blk.") and "_norm" not in n}
    kinds = {n: t.tensor_type.name for n, t in tensors.items()}
    size = sum(t.n_bytes for t in tensors.values())
    assert 5.5 < 8 * size / sum(s.N * s.K for s in plan.linears.values()) <= 6.0
    assert any(len({kinds[f"blk.{i}.attn_{p}.weight"] for p in "qkv"}) > 1 for i in (0, 1)), "apart in the file"
    said = summary["recipe"]["override"]
    assert len(said) == len(set(kinds.values())) and "choices" not in summary["recipe"]
    quantize(prepare(str(folder), Recipe(**summary["recipe"]), "cpu"), tmp_path / "again.gguf")
    again = GgufFile(tmp_path / "again.gguf").tensors
    assert all(again[n].tensor_type.name == kind for n, kind in kinds.items()), "the recipe repeats the run"


def test_experts_that_lie_in_one_tensor_become_one_type(tokenizer_bos, tmp_path):
    FAMILIES["mixtral"].save(tmp_path / "moe")
    tokenizer_bos.save_pretrained(tmp_path / "moe")
    plan = outline(str(tmp_path / "moe"), Recipe(format="gguf", method="rtn", type="Q4_0", target_bpw=6.0), "cpu")
    found = {n: (n, [Choice(c, s, 1.0) for c, s in plan.sizes(spec).items()]) for n, spec in plan.linears.items()}
    units = _joined(found, plan)
    assert {n for names in units for n in names} == set(plan.linears)
    together = [names for names in units if len(names) > 1]
    assert together and all(len(names) == 4 and ".experts." in names[0] for names in together)
    assert all(len({n.rpartition(".")[2] for n in names}) == 1 for names in together), "gate, up and down apart"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"choices": "Q4_0,fp8"}, "--choices 'FP8' is no ggml type"),
        ({"target_bpw": 4.0}, "--target-bpw 4 is too low: at the fewest of --choices a weight takes 4.500"),
        ({"bit_choices": "3,4"}, "--bit-choices means nothing here"),
        ({"override": ("ffn_down:type=Q6_K",)}, "--target-bpw chooses the bits of every linear"),
    ],
)
def test_what_a_budget_of_gguf_refuses(tiny_checkpoint, options, said):
    with pytest.raises(LlmqError, match=said):
        outline(str(tiny_checkpoint()), Recipe(**({"format": "gguf", "target_bpw": 6.0} | options)), "cpu")


def test_inputs_in_4_bits_cost_more_than_floats(tiny_checkpoint, tmp_path, prose):
    (text := tmp_path / "calibration.txt").write_text(prose(1000))
    plan = prepare(str(tiny_checkpoint()), Recipe(method="rtn", samples=4, seq_len=32, calib=str(text), dtype="float32",
                   target_bpw=8.0, choices="nvfp4,nvfp4a16,float"), "cpu")  # fmt: skip
    W_NK, X_TK, s_T = torch.randn(32, 64), torch.randn(128, 64), torch.ones(128)
    stats = collect((Hessian, Histogram), [X_TK], Dealt.of([128]))
    spec = LinearSpec("a", 32, 64, plan.method.base)
    schemes = [one and one.scheme for one in plan.method.possible(spec).values()]
    both, weights, none = (_divergence(W_NK, scheme, X_TK, stats, s_T) for scheme in schemes)
    assert both > 1.5 * weights > 0 == none
