"""`self`: the float model writes its own calibration text.

Sampled at temperature 1 from BOS, or from a random first token where the tokenizer adds none (Liu et al. 2023, LLM-QAT,
arXiv:2305.17888, section 3.1); it writes on after an end-of-text token, as in a stream of documents. Nothing is
downloaded, but the whole model must be in memory, and every token costs a forward.
Not here: text that others wrote (text.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from llmq.calibration.text import bos_id
from llmq.model.config import head_dim, kv_heads
from llmq.types import LlmqError

WRITE_BATCH = 32
"""Sequences written side by side: on two cores the step of SmolLM2-135M costs 80 ms for 32 and 50 ms for 8."""
WRITE_CACHE_BYTES = 2**30
"""Their key-value cache may take this much, or as much as the weights where that is more."""
WRITE_FACTOR = 10
"""`self` is refused if writing would take this many times as long as one forward over the same tokens ..."""
WRITE_SECONDS = 600
"""... and longer than this. Quantizing takes between two and ten such forwards, the solving included."""
TRIED_STEPS = 12
"""Tokens of each sequence that are written to find that out."""
_TOLD = 8  # tokens of each sequence between two words on how it goes on
Told = Callable[[int, int], object]
"""Called with how many tokens of how many are written."""


@dataclass(frozen=True)
class Writer:
    """Who writes `self`. load: returns the transformers model; `check_memory` first. told: hears how it goes on."""

    load: Callable[[], Any]
    told: Told = lambda *_: None

    def __call__(self, tokenizer: Any, samples: int, seq_len: int, seed: int) -> Tensor:
        """Return what the model writes, as `write`."""
        return write(self.load(), tokenizer, samples, seq_len, seed, self.told)


def check_memory(parameter_bytes: int, device: str | torch.device = "cpu") -> None:
    """Raise LlmqError if a model of `parameter_bytes` cannot write on `device`: weights and cache exceed what is free.

    Ask before loading it: `tokens` sees it loaded.
    """
    free = free_memory(torch.device(device))
    need = writing_bytes(parameter_bytes)
    if need > free:
        raise LlmqError(
            f"calibration text `self` needs the whole model and its cache in memory, {need / 1e9:.1f} GB of which "
            f"{free / 1e9:.1f} GB are free: give a text file, as --calib FILE"
        )


def writing_bytes(parameter_bytes: int) -> int:
    """Return the most that a model of `parameter_bytes` and its cache take while it writes."""
    return parameter_bytes + max(parameter_bytes, WRITE_CACHE_BYTES)


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that are free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def write(model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int, told: Told = lambda *_: None) -> Tensor:
    """Return `samples` sequences that `model` writes, int64 `[samples, seq_len]`; BOS, if added, is never sampled."""
    model.eval()
    batch = min(samples, side_by_side(model.config, sum(p.nbytes for p in model.parameters()), seq_len, model.dtype))
    _check_time(model, samples, seq_len, batch)
    generator = torch.Generator(model.device).manual_seed(seed)
    bos = bos_id(tokenizer)
    bias_V = torch.zeros(model.config.get_text_config().vocab_size, device=model.device)
    bias_V[len(tokenizer) :] = -torch.inf  # rows that only pad the embedding
    if bos is None:
        start_V = bias_V.clone()
        start_V[[i for i in tokenizer.all_special_ids if i < len(start_V)]] = -torch.inf
        first = _draw(start_V.repeat(samples, 1), generator)
    else:
        bias_V[bos] = -torch.inf
        first = torch.full((samples, 1), bos, device=model.device)
    written = list[Tensor]()
    for part in first.split(batch):
        before = sum(w.numel() for w in written)
        tell = partial(_tell, told, before, samples * seq_len)
        written.append(_continue(model, part, seq_len, generator, bias_V, tell))
    return torch.cat(written).cpu()


def _tell(told: Told, before: int, total: int, tokens: int) -> None:
    told(before + tokens, total)


@torch.inference_mode()
def _continue(
    model: Any,
    first_B1: Tensor,
    length: int,
    generator: torch.Generator,
    bias_V: Tensor | float,
    tell: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """Return `first_B1` continued to `[B, length]` by sampling at temperature 1 from the logits plus `bias_V`.

    tell: is called now and then with how many tokens there are.
    """
    from llmq.calibration.preallocated import preallocated_cache

    written, cache = [first_B1], preallocated_cache(model.config, length)
    while len(written) < length:
        out = model(written[-1], past_key_values=cache, use_cache=True)
        written.append(_draw(out.logits[:, -1].float() + bias_V, generator))
        if len(written) % _TOLD == 0:
            tell(len(first_B1) * len(written))
    return torch.cat(written, dim=1)


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """Return one id per row, `[B, 1]`, by inverting the cumulative distribution: a third of the time of multinomial."""
    cdf_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    if not cdf_BV[:, -1].isfinite().all():
        raise LlmqError("the model writes NaN: its weights are broken, or overflow in this dtype")
    u_B1 = torch.rand(len(cdf_BV), 1, dtype=torch.float64, device=cdf_BV.device, generator=generator)
    return torch.searchsorted(cdf_BV, u_B1 * cdf_BV[:, -1:], right=True)


def side_by_side(config: Any, parameter_bytes: int, seq_len: int, dtype: torch.dtype) -> int:
    """Return how many sequences the cache holds: a function of the model alone, so that a seed means one text."""
    text = config.get_text_config()
    each = 2 * text.num_hidden_layers * kv_heads(text) * head_dim(text) * seq_len * dtype.itemsize
    return max(1, min(WRITE_BATCH, max(WRITE_CACHE_BYTES, parameter_bytes) // each))


def _check_time(model: Any, samples: int, seq_len: int, batch: int) -> None:
    """Raise LlmqError if writing would far outlast quantizing, from the best of a few short timings of both."""
    generator = torch.Generator(model.device).manual_seed(0)
    start = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    tried = range(TRIED_STEPS // 3)
    step = min(_seconds(lambda: _continue(model, start, 4, generator, 0.0)) for _ in tried) / 3
    writing = step * seq_len * -(-samples // batch)
    if writing <= WRITE_SECONDS:
        return
    long = torch.zeros(1, min(seq_len, 512), dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        read = min(_seconds(lambda: model(long, use_cache=False).logits) for _ in range(2))
    reading = read * samples * seq_len / long.shape[1]
    if writing > WRITE_FACTOR * reading:
        raise LlmqError(
            f"calibration text `self` would take about {writing / 60:.0f} min to write, {writing / reading:.0f} times "
            "what it takes to read: give a text file, as --calib FILE, or lower --samples or --seq-len"
        )


def _seconds(run: Callable[[], Tensor]) -> float:
    """Return how long `run` takes, to the moment its result can be read on the CPU."""
    began = time.perf_counter()
    run().flatten()[-1].item()
    return time.perf_counter() - began
