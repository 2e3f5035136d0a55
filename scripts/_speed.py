"""Tokens per second of a transformers model: what llmq's models and a rival's, in its own environment, are timed by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

PROMPT, NEW, PREFILL = 128, 64, 512


def token_ids(vocab: int) -> torch.Tensor:
    """Return the same PREFILL random tokens, `[1, PREFILL]`, for every model of a vocabulary."""
    return torch.randint(3, vocab, (1, PREFILL), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, new: int, now: Callable[[], float] = time.perf_counter) -> float:
    """Return the tokens per second of `new` greedy steps after a prompt of PROMPT tokens, which is not timed."""
    cache = DynamicCache(config=model.config)
    token = model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    began = now()
    for _ in range(new):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return new / (now() - began)


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor, now: Callable[[], float] = time.perf_counter) -> float:
    """Return the tokens per second of one forward over all of `ids`."""
    began = now()
    model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    return ids.shape[1] / (now() - began)
