"""How fast a checkpoint writes here: tokens a second of one sequence, the prompt's left out.

Not here: other machines (pipeline/machines.py), benchmarks of kernels (scripts/).
"""

import time
from pathlib import Path
from typing import Any

import torch

from llmq.loading import load
from llmq.model.pretrained import foreign

PROMPT, WRITTEN = 32, 16


def tokens_per_second(folder: str | Path, device: str = "auto") -> float:
    """Return how many tokens a second a checkpoint writes greedily behind a prompt of 32.

    The time of the first of them, which reads the prompt, is taken off. Raises LlmqError as `load` does.
    """
    model: Any = load(folder, device=device)
    prompt = torch.arange(PROMPT, device=model.device)[None] % model.config.get_text_config().vocab_size
    with foreign(f"{folder}: transformers cannot generate"):
        _seconds(model, prompt, 2)  # what is compiled at first use
        taken = _seconds(model, prompt, 1 + WRITTEN) - _seconds(model, prompt, 1)
    return WRITTEN / max(taken, 1e-9)


def _seconds(model: Any, prompt: torch.Tensor, n: int) -> float:
    began = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began
