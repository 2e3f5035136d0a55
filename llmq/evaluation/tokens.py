"""Every scored token by itself: what the model made of it, what the baseline did, where it stands.

    tokens = score(windows, model, baseline)      nll, kl, agree ... of each, `[T]`
    tokens.of(range(3, 7))                        those of some windows alone

Logits are compared in float32, a few positions at a time: `[2048, vocab]` in float32 never exists.
Not here: the figures over them (scores.py), which of them a text gives (windows.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq.evaluation.windows import Window
from llmq.types import LlmqError

CHUNK = 64  # positions whose logits are held at once: 13 MB a copy at 49152 entries; twice as fast on CPU as 256


class Predicts(Protocol):
    """A model as it is scored: states of windows, and the logits of a few positions of them.

    model: transformers' own, for its config and the shapes of its weights. name: what messages call it. vocab: tokens
    that it tells apart. kv_bits: of its key-value cache, None for a float one.
    """

    model: Any
    name: str
    vocab: int
    kv_bits: int | None

    def each(self, windows: Sequence[list[int]]) -> Iterator[Tensor]:
        """Yield the states of each window, `[T, hidden]` or what else `log_probs` takes rows of."""

    def log_probs(self, states: Tensor) -> Tensor:
        """Return the float32 log-probabilities `[T, vocab]` of some of the states of a window that was yielded."""

    def ready(self) -> AbstractContextManager[None]:
        """Return within what `log_probs` takes states that were yielded by an `each` that has ended."""

    def rest(self) -> None:
        """Let go what makes states and no logits: `each` is not asked again."""


@dataclass(frozen=True)
class Against:
    """What the baseline made of the tokens: -log p, KL(p || q), and whether both rank the same token first, `[T]`."""

    nll: Tensor
    kl: Tensor
    agree: Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens that were scored, those of a window side by side; every tensor is `[T]`, on the CPU.

    ids: the tokens; before: the one before each; window: which they are in; position: tokens before it there.
    nll: -log q, float64. truth: what the baseline made of them, None without one.
    """

    ids: Tensor
    before: Tensor
    window: Tensor
    position: Tensor
    nll: Tensor
    truth: Against | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, windows: range) -> "Tokens":
        """Return the tokens of some windows."""
        kept = (self.window >= windows.start) & (self.window < windows.stop)
        truth = None if self.truth is None else Against(*(t[kept] for t in vars(self.truth).values()))
        own = (self.ids[kept], self.before[kept], self.window[kept], self.position[kept])
        return Tokens(*own, nll=self.nll[kept], truth=truth)


def score(
    windows: Sequence[Window],
    model: Predicts,
    baseline: Predicts | None,
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Return what the model, and the baseline where there is one, make of every token that the windows score.

    progress: called with (done, total) after every window.
    Raises LlmqError for logits that are not finite, naming the window.
    """
    read = [w.ids[:-1] for w in windows]
    parts: list[Tensor] = []
    with torch.inference_mode():
        truths = baseline.each(read) if baseline else [None] * len(read)
        for i, (window, q, p) in enumerate(zip(windows, model.each(read), truths, strict=True)):
            parts += _scored(window, f"window {i + 1} of {len(windows)}", model, baseline, (q, p))
            if progress:
                progress(i + 1, len(windows))
    nll, *more = torch.cat(parts).T
    truth = Against(more[0], more[1], more[2].bool()) if more else None
    return Tokens(*_placed(windows), nll=nll, truth=truth)


def _placed(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scored tokens of windows, those before them, their windows and their positions, int64 `[T]` each."""
    return (
        torch.tensor([i for w in windows for i in w.ids[w.first :]]),
        torch.tensor([i for w in windows for i in w.ids[w.first - 1 : -1]]),
        torch.tensor([n for n, w in enumerate(windows) for _ in w.ids[w.first :]]),
        torch.tensor([i for w in windows for i in range(w.first, len(w.ids))]),
    )


def _scored(
    window: Window, where: str, model: Predicts, baseline: Predicts | None, both: tuple[Tensor, Tensor | None]
) -> Iterator[Tensor]:
    """Yield, for a few of the scored tokens at a time, float64 `[t, 1]` on the CPU: -log q; with a baseline `[t, 4]`.

    The other columns are -log p, the KL divergence and 1 where both rank the same token first. both: the states of the
    window, the model's and the baseline's.
    """
    of_model, of_baseline = both
    states = of_model[window.first - 1 :]
    truth = None if of_baseline is None else of_baseline[window.first - 1 :]
    targets = torch.tensor(window.ids[window.first :], device=states.device)
    for i in range(0, len(targets), CHUNK):
        part = slice(i, i + CHUNK)
        log_q = model.log_probs(states[part])
        columns = [_nll(log_q, targets[part], f"{where}: {model.name}")]
        if baseline is not None and truth is not None:
            log_p = baseline.log_probs(truth[part]).to(log_q.device)
            columns.append(_nll(log_p, targets[part], f"{where}: {baseline.name}"))
            kl = log_p.exp().mul_(log_p - log_q).sum(-1, dtype=torch.float64)
            columns += [kl.clamp(min=0), (log_p.argmax(-1) == log_q.argmax(-1)).double()]  # below 0 by rounding only
        yield torch.stack(columns, dim=1).cpu()


def _nll(log_p: Tensor, targets: Tensor, where: str) -> Tensor:
    nll = -log_p.gather(1, targets[:, None])[:, 0].double()
    if not nll.isfinite().all():
        raise LlmqError(f"{where} gives NaN or infinite logits: its weights are broken, or overflow in this dtype")
    return nll
