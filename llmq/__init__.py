"""llmq: quantize Llama-family checkpoints to 2-8 bits, in files that standard runtimes load unchanged.

Importing the package imports nothing else and changes nothing; the names below are fetched when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmq.api import convert, dequantize, evaluate, evaluate_all, evaluate_tasks, plan, quantize
    from llmq.comparing import compare
    from llmq.integrations.cache import QuantizedCache
    from llmq.loading import load, load_tokenizer
    from llmq.types import LlmqError

__version__ = "0.1.0"
__all__ = [
    "LlmqError", "QuantizedCache", "__version__", "compare", "convert", "dequantize", "evaluate", "evaluate_all",
    "evaluate_tasks", "load", "load_tokenizer", "plan", "quantize",
]  # fmt: skip

_HOME = {
    "LlmqError": "llmq.types",
    "QuantizedCache": "llmq.integrations.cache",
    "compare": "llmq.comparing",
    "convert": "llmq.api",
    "dequantize": "llmq.api",
    "evaluate": "llmq.api",
    "evaluate_all": "llmq.api",
    "evaluate_tasks": "llmq.api",
    "load": "llmq.loading",
    "load_tokenizer": "llmq.loading",
    "plan": "llmq.api",
    "quantize": "llmq.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
