"""What a config says of packed weights, or why it does not say it."""

import pytest

from llmq.errors import LlmqError
from llmq.verify.packing import packing

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
GROUP = {"weights": {"num_bits": 4, "group_size": 32}, "targets": ["Linear"], "format": "pack-quantized"}


def grouped(**changes):
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP | changes}}


@pytest.mark.parametrize(
    "config",
    [{}, GPTQ | {"bits": "4"}, GPTQ | {"group_size": 0}, GPTQ | {"modules_in_block_to_quantize": 5},
     GPTQ | {"modules_in_block_to_quantize": [[5]]}, GPTQ | {"dynamic": 5}, GPTQ | {"dynamic": {"-:x": 5}},
     GPTQ | {"quant_method": "awq", "modules_to_not_convert": 5},
     grouped(input_activations=5), grouped(weights=5), grouped(targets=5), grouped(targets=[5]), grouped(format=5)],
)  # fmt: skip
def test_a_config_of_other_types_is_one_line(config):
    with pytest.raises(LlmqError, match="quantization_config"):
        packing(config)


def test_what_is_null_is_as_if_it_were_missing():
    nulls = {"modules_in_block_to_quantize": None, "dynamic": None}
    for config in (GPTQ | nulls, GPTQ | {"dynamic": {"-:lm_head": None}}, grouped(input_activations=None)):
        how = packing(config)("model.layers.0.mlp.down_proj")
        assert how is not None and (how.bits, how.group) == (4, 32)
