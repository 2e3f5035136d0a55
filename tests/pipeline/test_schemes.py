"""Whole runs of schemes: what is written loads, and computes with its inputs rounded as the scheme says."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.runtime.linear import QuantLinear
from llmq.schemes import SCHEMES

SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}


def made(folder, out, prose, **options):
    text = folder / "calibration.txt"
    text.write_text(prose(500))
    calibrated = {"calib": str(text), "samples": 4, "seq_len": 16, "dtype": "float32"}
    return quantize(prepare(str(folder), Recipe(**calibrated, **options), "cpu"), out)


def simulated(folder, model):
    """Return the float model with the weights that the linears of another decode to, and their inputs rounded."""
    floats = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        twin, q, inputs = floats.get_submodule(name), layer.unpack(), layer.spec.scheme.activation
        twin.weight.data = layer.dequantize()
        if inputs is not None:
            twin.register_forward_pre_hook(lambda _, x, q=q, inputs=inputs: inputs.fake_quantize(x[0], q.input))
    return floats


PAIRS = {"W4AFP8": {"weights": "int", "inputs": "fp8"}, "MXFP4xFP8": {"weights": "mxfp4", "inputs": "fp8:group=128"}}


@pytest.mark.parametrize("name", [*SCHEMES, *PAIRS])
def test_what_is_written_computes_with_its_inputs_rounded(name, tiny_checkpoint, tmp_path, prose):
    folder = tiny_checkpoint(**SMALL)
    record = made(folder, tmp_path / "out", prose, **PAIRS.get(name, {"scheme": name}), method="rtn")
    model = llmq.load(tmp_path / "out", dtype=torch.float32, backend="reference")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == len(record["linears"]) == 7 + (name == "mixed")
    for layer in layers.values():
        assert (layer.unpack().input is not None) == layer.spec.scheme.static
    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        got, want = model(ids).logits, simulated(folder, model)(ids).logits
        floats = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert torch.equal(got, want) and (floats - want).norm() < 0.5 * floats.norm()


def test_one_divisor_for_the_inputs_of_a_site(tiny_checkpoint, tmp_path, prose):
    folder = tiny_checkpoint(**SMALL)
    made(folder, tmp_path / "out", prose, scheme="nvfp4", quality="fast")
    tensors = load_file(tmp_path / "out/model.safetensors")
    divisors = {n: t.item() for n, t in tensors.items() if n.endswith("input_global_scale")}
    assert len(divisors) == 7 and len(set(divisors.values())) == 4, "q, k, v; o; gate, up; down"
