"""Calibration tokens: the text on which a solver sees the activations that it must preserve.

Every source ends as one int64 tensor `[samples, seq_len]` of full sequences, so that nothing downstream knows pads:

    BOS  t_1 ... t_{L-1}     exactly one BOS, first, where the tokenizer adds one to a text; no BOS elsewhere
    t_1  t_2 ... t_L         else

text.py: files, folders and Hub data sets. rows.py: their rows and chats. writing.py: text that the model writes.
varied.py: texts of ours.
Several sources are read one after the other and take turns (llmq/blend.py).
Not here: what is accumulated over the tokens (stats), running blocks on them (model), scoring text (evaluation).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq import blend
from llmq.calibration.text import HUB as HUB
from llmq.calibration.text import HubText as HubText
from llmq.calibration.text import bos_id as bos_id
from llmq.calibration.text import encode as encode
from llmq.calibration.text import hub_rows as hub_rows
from llmq.calibration.text import read
from llmq.calibration.text import require as require_text
from llmq.calibration.varied import varied
from llmq.calibration.writing import Writer as Writer
from llmq.calibration.writing import check_memory as check_memory
from llmq.calibration.writing import free_memory as free_memory
from llmq.types import LlmqError


def tokens(
    source: str | Sequence[str],
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    writer: Writer | None = None,
    warn: Callable[[str], Any] = warnings.warn,
) -> Tensor:
    """Return `samples` calibration sequences, int64 `[samples, seq_len]` on the CPU; same arguments, same tokens.

    source: `self`; `varied`; a short name of `HUB`; a .txt, .jsonl, .parquet or .arrow file, or a folder of them (read
        in the order of their paths); or a Hub data set as `org/name[:config[:split]]`. Rows hold `text` or a chat, in
        `messages` or `conversations`. Or several of them, each with its share of the samples (blend.py).
    writer: who writes what `self` asks for. warn: is told, in one line, what of the source was left out.

    Raises LlmqError for a source that cannot be read, is too short, or would take too long to write.
    """
    if samples < 1 or seq_len < 2:
        raise LlmqError(f"calibration wants --samples >= 1 and --seq-len >= 2, not {samples} and {seq_len}")
    parts = blend.dealt(source, samples)
    rows = list[Tensor]()
    for part in parts:
        how = (tokenizer, part.samples, seq_len, seed)
        with _naming(part, samples):
            rows.append(_of(part.source, writer, warn)(*how))
    return torch.cat(rows)[blend.in_turns(p.samples for p in parts)]


def require(source: str | Sequence[str], samples: int) -> None:
    """Raise LlmqError for a source that `tokens` could not read, as far as its name and files' names tell."""
    for part in blend.dealt(source, samples):
        if part.source not in (blend.SELF, blend.VARIED):
            with _naming(part, samples):
                require_text(part.source)


def _of(source: str, writer: Writer | None, warn: Callable[[str], Any]) -> Callable[[Any, int, int, int], Tensor]:
    """Return what makes the sequences of a source, of a tokenizer, how many, how long, and a seed."""
    if source == blend.VARIED:
        return varied
    if source != blend.SELF:
        return partial(read, source, warn=warn)
    if writer is None:
        raise LlmqError("calibration text `self` needs a model that writes it: give a text file instead")
    return writer


@contextmanager
def _naming(part: blend.Part, samples: int) -> Iterator[None]:
    """Say of which of several sources an error is, and what its share is."""
    try:
        yield
    except LlmqError as e:
        if part.samples == samples:
            raise
        raise LlmqError(f"--calib {part.source} ({part.samples} of {samples} samples): {e}") from e
