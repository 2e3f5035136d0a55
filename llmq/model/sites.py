"""Which linears of a block read the same activation, discovered by one forward; a family may override it (families/).

Not here: what the activation comes from (producers.py), suspending batches at the sites (lanes.py).
"""

import re
from collections import Counter

from torch import Tensor, nn

from llmq import registry
from llmq.model.experts import linears_of
from llmq.model.lanes import Call, run
from llmq.types import LlmqError, Site


def discover(block: nn.Module, hidden: Tensor, call: Call) -> tuple[Site, ...]:
    """Return the sites of an unknown block: linears that read the same tensor, in call order, found by one forward.

    Raises LlmqError, naming them, for linears that are not called exactly once.
    """
    linears = linears_of(block)
    seen: list[tuple[str, Tensor]] = []
    hooks = [m.register_forward_pre_hook(lambda _m, args, n=n: seen.append((n, args[0]))) for n, m in linears.items()]
    try:
        run(block, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    called = Counter(n for n, _ in seen)
    odd = sorted(n for n in linears if called[n] != 1)
    if odd:
        raise LlmqError(f"{', '.join(odd[:4])}: not called exactly once per batch; only rtn or --skip can take these")
    groups: dict[int, list[str]] = {}
    for name, x in seen:  # which keeps them all: no two have one id
        groups.setdefault(id(x), []).append(name)
    return tuple(Site(tuple(names), None, names[0] if len(names) == 1 else "") for names in groups.values())


def refuse_other_matrices(block: nn.Module, where: str) -> None:
    """Raise LlmqError, by name, for matrices of block `where` that should be quantized and are in no `nn.Linear`.

    These are fused experts `[E, N, K]` and the Conv1D of GPT-2. Other parameters (routers, convolutions, sinks, states
    of linear attention) stay as they are.
    """
    from transformers.pytorch_utils import Conv1D

    found = [
        f"{where}.{name}.{leaf} {list(p.shape)} of {type(module).__name__}"
        for name, module in block.named_modules()
        for leaf, p in module.named_parameters(recurse=False)
        if not isinstance(module, nn.modules.conv._ConvNd)
        and (p.dim() > 2 or (p.dim() == 2 and isinstance(module, Conv1D)))
    ]
    if found:
        raise LlmqError(f"{found[0]} (of {len(found)} there) should be quantized, and is no nn.Linear: not known yet")


def overridden(model_type: str, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return what the override of a model_type makes of sites that were found; without one, these."""
    name = re.sub(r"\W", "_", model_type)
    if name not in registry.names("families"):
        return sites
    changed: tuple[Site, ...] = registry.load("families", name).sites(sites)
    return changed
