"""Linears that read one activation, multiplied as one on a GPU: q, k and v of an attention, gate and up of an MLP.

Where those of a layer's experts can be one product, that is done first (experts.py).

Their packed words lie behind each other in one tensor, of which each linear still has its part, so that the tensors of
the file come back as from any other linear; the product is one launch for two or three, and W8A8 rounds its input once.
Nothing of the model's own forward is changed: see `Site`, which each linear asks for its part of the product.

Joined are linears of one module that are named as below and alike in back-end, bits, groups and what else a kernel
fixes; where a mixture of bits makes only two of three alike, those. Not here: the product (backends/_triton.py).
"""

from collections.abc import Hashable
from functools import partial

from torch import nn

from llmq.runtime.backends._triton import Site, TritonPrepacked
from llmq.runtime.experts import group_experts
from llmq.runtime.linear import QuantLinear

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
)
"""What the linears that read one activation are called, side by side in one module."""


def join_sites(model: nn.Module) -> int:
    """Join what can be joined below a module; return how many products of several linears became one."""
    layers = group_experts(model)
    found = [site for module in model.modules() for names in NAMES for site in _alike(module, names)]
    for linears in found:
        Site([packed for _, packed in linears], [partial(getattr, linear, "bias") for linear, _ in linears])
    return len(found) + 2 * layers


def _alike(module: nn.Module, names: tuple[str, ...]) -> list[list[tuple[QuantLinear, TritonPrepacked]]]:
    """Return the linears of a module that go together, two or more, each with its weight."""
    kinds: dict[Hashable, list[tuple[QuantLinear, TritonPrepacked]]] = {}
    for name in names:
        linear = module._modules.get(name)
        packed = linear.prepacked if isinstance(linear, QuantLinear) else None
        if isinstance(linear, QuantLinear) and isinstance(packed, TritonPrepacked) and packed.site is None:
            kinds.setdefault(packed.kind(), []).append((linear, packed))
    kinds.pop(None, None)
    return [linears for linears in kinds.values() if len(linears) > 1]
