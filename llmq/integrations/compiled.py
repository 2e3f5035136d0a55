"""A model whose `generate` is compiled: a static cache, decode as one CUDA graph a step, prefill region by region.

    model = llmq.load(path, compile=True)      # or compile_for_generation(model)
    model.generate(**inputs)

By transformers' and torch's own means. In decode, `generate` compiles the forward of one token with the cache in fixed
memory, as mode "reduce-overhead" does: what is launched is captured in CUDA graphs, our kernels, the head and the cache
in the same. A prompt has any length, so that no graph of it would be used twice: there the regions of the blocks that
know nothing of the cache, the MLPs, are compiled for any number of tokens. Those that are alike share one compilation;
whole blocks would not, as each has its number in the cache, and torch gives up after eight.

Not here: the cache that a chat keeps (talk/in_torch.py), llmq's own cache, which is not static (integrations/cache.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CompileConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.model.experts import Experts
from llmq.runtime.linear import QuantLinear

_ROWS: dict[str, Any] = {"split_reductions": False}
"""Inductor's options for a region: a program reduces a whole row, of any length. It would share those beyond 8,192
values among several and launch again for what they found, a norm or what quantizes apart from what is around it."""
_GRAPH = {"triton.cudagraphs": True, **_ROWS}
"""For decode: those of mode "reduce-overhead" too."""


def compile_for_generation(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Have `generate` compile a model, from its first tokens on; a forward of its own is eager but for its regions.

    The choice is the model's `generation_config`; of it `save_pretrained` writes that the cache is static, no more.
    backend: torch.compile's; another than "inductor" compiles on a CPU too, to test what is computed.
    Raises LlmqError for a model whose cache cannot be static.
    """
    if not compiles(model):
        raise LlmqError(
            f"a {model.config.model_type} model cannot be compiled with a static cache; load without compile"
        )
    inductor = backend == "inductor"
    config = CompileConfig(backend=backend, mode=None, options=_GRAPH if inductor else None)  # type: ignore[arg-type]
    config._compile_all_devices = not inductor  # type: ignore[assignment]  # transformers' own way to test on a CPU
    settings: Any = model.generation_config
    settings.cache_implementation, settings.compile_config = "static", config
    for region in _regions(model):
        region.compile(backend=backend, dynamic=True, options=_ROWS if inductor else None)


def compiles(model: Any) -> bool:
    """Return whether transformers can compile a model whole, with a static cache."""
    return bool(model._can_compile_fullgraph and model._supports_default_dynamic_cache())


def is_compiled(model: PreTrainedModel) -> bool:
    """Return whether `compile_for_generation` has had the model."""
    return getattr(model.generation_config, "compile_config", None) is not None


def _regions(model: PreTrainedModel) -> list[nn.Module]:
    """Return what of each decoder block has linears and no number in the cache, nor experts that run one by one."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth for block in m]
    return [child for block in blocks for child in block.children() if _is_region(child)]


def _is_region(module: nn.Module) -> bool:
    below = list(module.modules())
    has_linears = len(below) > 1 and any(isinstance(m, nn.Linear | QuantLinear) for m in below)
    varies = (isinstance(m, Experts) and m.together is None for m in below)
    return has_linears and not any(varies) and not any(hasattr(m, "layer_idx") for m in below)
