"""A model whose `generate` is compiled: a static cache, decode as one CUDA graph a step, prefill block by block.

    model = llmq.load(path, compile=True)      # or compile_for_generation(model)
    model.generate(**inputs)

By transformers' and torch's own means. In decode, `generate` compiles the forward of one token with the cache in fixed
memory (mode "reduce-overhead": what is launched is captured in CUDA graphs, our kernels, the head and the cache in the
same). A prompt has any length, so that no graph of it would be used twice: there the blocks are compiled one by one,
for any number of tokens, and blocks that are alike share one compilation.

Not here: the cache that a chat keeps (talk/in_torch.py), llmq's own cache, which is not static (integrations/cache.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CompileConfig, PreTrainedModel

from llmq.errors import LlmqError


def compile_for_generation(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Have `generate` compile a model, from its first tokens on; a forward of its own is eager but for its blocks.

    The choice is the model's `generation_config`, and is written with it by `save_pretrained`.
    backend: torch.compile's; another than "inductor" compiles on a CPU too, to test what is computed.
    Raises LlmqError for a model without a list of decoder blocks, or whose cache cannot be static.
    """
    if not model._can_compile_fullgraph:
        raise LlmqError(
            f"a {model.config.model_type} model cannot be compiled with a static cache; load without compile"
        )
    inductor = backend == "inductor"
    config = CompileConfig(backend=backend, mode="reduce-overhead" if inductor else None)  # type: ignore[arg-type]
    config._compile_all_devices = not inductor  # type: ignore[assignment]  # transformers' own way to test on a CPU
    settings: Any = model.generation_config
    settings.cache_implementation, settings.compile_config = "static", config
    for block in _blocks(model):
        block.compile(backend=backend, dynamic=True)


def is_compiled(model: PreTrainedModel) -> bool:
    """Return whether `compile_for_generation` has had the model."""
    return getattr(model.generation_config, "compile_config", None) is not None


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder blocks. Raises LlmqError where there is no list of them."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise LlmqError(f"a {model.config.model_type} model has no list of {depth} decoder blocks to compile")
    return list(lists[0])
