"""What quantization cost: perplexity, KL divergence and top-1 agreement, by the conventions that others publish.

    perplexity = exp(-sum_t log q(t) / n)      q: the model, over the scored tokens t; n: tokens, or words
    KL         = mean_t sum_v p_t(v) log(p_t(v) / q_t(v))      p: the float baseline, at the same positions
    top-1      = share of positions where argmax p = argmax q

Perplexity alone misleads, since it can fall while the model drifts from the baseline; KL cannot. Standard errors take
tokens as independent, as llama.cpp does. Logits are compared in float32, a few positions at a time: `[2048, vocab]` in
float32 never exists.

Not here: which windows of a text are scored (windows), loading models (loading), text to calibrate on (calibration).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.evaluation.windows import Convention, Text, Window, cut, fit
from llmq.model.pretrained import check_ids
from llmq.show import Rows
from llmq.types import LlmqError

KV_CHUNK = 32
"""Tokens fed at once where the key-value cache is quantized: with whole windows nothing would be read back from it."""
CHUNK = 64  # positions whose logits are held at once: 13 MB a copy at 49152 entries; twice as fast on CPU as 256


@dataclass(frozen=True)
class Evaluation:
    """One model measured on one text.

    perplexity: per `unit` ("token" or "word"), with its standard error; byte_perplexity for unit "word".
    count: how many units the text has; tokens: how many were scored; seconds: wall time, the baseline's included.
    baseline_perplexity, kl_mean and its standard error (nats per token), kl_p999 (99.9 percentile over the tokens) and
        top1 (share, 0 to 1): against the baseline, None without one.
    kv_bits: of the model's key-value cache, None for a float one.
    """

    convention: str
    window: int
    unit: str
    perplexity: float
    standard_error: float
    count: int
    tokens: int
    seconds: float
    byte_perplexity: float | None = None
    baseline_perplexity: float | None = None
    kl_mean: float | None = None
    kl_standard_error: float | None = None
    kl_p999: float | None = None
    top1: float | None = None
    kv_bits: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `json.dumps` takes them; infinite values become None."""
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


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


def refuse(windows: int | None, kv_bits: int | None, *, stream: bool = False) -> None:
    """Raise LlmqError for what can be refused before a model is loaded: no window, bits that no cache has.

    Nor has a cache any that is streamed: blocks that see whole windows read nothing back from one.
    """
    if stream and kv_bits is not None:
        raise LlmqError("--kv-bits needs the whole model in memory, fed a few tokens at a time; leave out --stream")
    if windows is not None and windows < 1:
        raise LlmqError(f"give 1 window or more, not {windows}")
    if kv_bits is not None:
        from llmq.integrations.cache import check_bits

        check_bits(kv_bits)


def evaluate(  # noqa: PLR0913, what is measured and how
    model: Any,
    tokenizer: Any,
    text: Text,
    convention: Convention,
    baseline: Any = None,
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    kv_bits: int | None = None,
) -> Evaluation:
    """Measure `model`, a transformers CausalLM, on `text`, against `baseline` where one is given.

    text: one text, or documents; only `lm-eval` keeps documents apart, and finds Wikipedia articles in one text.
    windows: score only the first so many windows; under `lm-eval`, documents.
    progress: called with (done, total) after every window.
    kv_bits: quantize the model's key-value cache, not the baseline's, and feed tokens `KV_CHUNK` at a time; static
        scales that the checkpoint came with are used at 8 bits.
    Both models are put in eval mode. Raises LlmqError as `measure` does.
    """
    refuse(windows, kv_bits)
    scored = Predictor(model.eval(), "the model", kv_bits)
    truth = None if baseline is None else Predictor(baseline.eval(), "the baseline")
    return measure(scored, truth, tokenizer, text, convention, windows, progress)


def measure(
    scored: Predicts,
    truth: Predicts | None,
    tokenizer: Any,
    text: Text,
    convention: Convention,
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure what predicts, in memory whole or block by block, against the truth where there is one; see `evaluate`.

    Raises LlmqError for a text that is too short, a window longer than the model reads, a baseline with another
    vocabulary, and logits that are not finite (naming the window).
    """
    began = time.perf_counter()
    how = fit(convention, scored.model)
    pieces, words, bytes_ = cut(text, tokenizer, how, windows)
    check_ids([i for w in pieces for i in w.ids], scored.model)
    if truth and truth.vocab != scored.vocab:
        raise LlmqError(f"the baseline has {truth.vocab} tokens in its vocabulary, the model {scored.vocab}")
    read = [w.ids[:-1] for w in pieces]
    parts: list[Tensor] = []
    with torch.inference_mode():
        truths = truth.each(read) if truth else [None] * len(read)
        for i, (piece, q, p) in enumerate(zip(pieces, scored.each(read), truths, strict=True)):
            parts += _score(piece, f"window {i + 1} of {len(pieces)}", scored, truth, (q, p))
            if progress:
                progress(i + 1, len(pieces))
    scores = torch.cat(parts)
    nll = scores[:, 0]
    count = words if how.unit == "word" else len(nll)
    perplexity = _exp(float(nll.sum()) / count)
    return Evaluation(
        convention=how.name,
        window=how.window,
        unit=how.unit,
        perplexity=perplexity,
        standard_error=perplexity * _error(nll) * len(nll) / count,
        count=count,
        tokens=len(nll),
        seconds=time.perf_counter() - began,
        byte_perplexity=_exp(float(nll.sum()) / bytes_) if how.unit == "word" else None,
        kv_bits=scored.kv_bits,
        **(_against(scores, count) if truth else {}),
    )


def table(rows: Mapping[str, Evaluation]) -> Rows:
    """Return a rich table, 80 columns wide, with a row per named evaluation and one for the first baseline."""
    first = next(iter(rows.values()))
    baseline = next((e.baseline_perplexity for e in rows.values() if e.baseline_perplexity is not None), None)
    versus = [] if baseline is None else ["change", "KL", "KL 99.9 %", "top-1"]
    title = f"{first.convention}: window {first.window}, {first.tokens} tokens scored, perplexity per {first.unit}"
    title += f", {first.kv_bits}-bit key-value cache" if first.kv_bits else ""
    out = Rows(title, box=None, show_header=True)
    out.add_column("model", overflow="fold", min_width=14)
    for head in ("perplexity", *versus, "seconds"):
        out.add_column(head, justify="right", no_wrap=True)
    if baseline is not None:
        out.add("baseline", f"{baseline:.3f}")
    for name, e in rows.items():
        cells = [""] * len(versus)
        if e.baseline_perplexity is not None:
            change = f"{100 * (e.perplexity / e.baseline_perplexity - 1):+.2f} %"
            cells = [change, f"{e.kl_mean:.5f}", f"{e.kl_p999:.4f}", f"{e.top1:.2%}"]
        out.add(name, f"{e.perplexity:.3f} ± {e.standard_error:.3f}", *cells, f"{e.seconds:.1f}")
    return out


class Predictor:
    """A model in memory as the states of a window and their logits, so that logits exist for a few positions at a time.

    The states are the last hidden states where the output embedding alone makes them the model's logits. A short probe
    decides: a model that scales, caps or masks its logits afterwards fails it, and its states are the logits.
    """

    def __init__(self, model: Any, name: str, kv_bits: int | None = None) -> None:
        self.model, self.name, self.head, self.kv_bits = model, name, None, kv_bits
        self.vocab = model.config.get_text_config().vocab_size
        head = model.get_output_embeddings()
        if head is not None and model.base_model is not model:
            probe = torch.arange(min(8, self.vocab), device=model.device)[None]
            with torch.inference_mode():
                states = model.base_model(probe, use_cache=False).last_hidden_state
                self.head = head if torch.equal(head(states), model(probe, use_cache=False).logits) else None

    def each(self, windows: Sequence[list[int]]) -> Iterator[Tensor]:
        """Yield the states of each window, which is run when it is asked for."""
        return map(self.states, windows)

    def states(self, ids: list[int]) -> Tensor:
        """Return `[T, hidden]`, or the logits `[T, vocab]`."""
        x = torch.tensor([ids], device=self.model.device)
        if self.kv_bits is None:
            return self._forward(x, use_cache=False)
        from llmq.integrations.cache import QuantizedCache

        cache = QuantizedCache.for_model(self.model, self.kv_bits)
        return torch.cat([self._forward(part, past_key_values=cache) for part in x.split(KV_CHUNK, dim=1)])

    def _forward(self, x: Tensor, **cache: Any) -> Tensor:
        if self.head is None:
            return self.model(x, **cache).logits[0]
        return self.model.base_model(x, **cache).last_hidden_state[0]

    def log_probs(self, states: Tensor) -> Tensor:
        """Return the float32 log-probabilities `[T, vocab]` of some of the states."""
        return F.log_softmax((states if self.head is None else self.head(states)).float(), dim=-1)


def _score(
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


def _against(scores: Tensor, count: int) -> dict[str, float]:
    """Return the fields of Evaluation that compare with the baseline, from the columns of `_score`."""
    _, nll, kl, agree = scores.T
    return {
        "baseline_perplexity": _exp(float(nll.sum()) / count),
        "kl_mean": float(kl.mean()),
        "kl_standard_error": _error(kl),
        "kl_p999": float(kl.sort().values[math.ceil(0.999 * len(kl)) - 1]),
        "top1": float(agree.mean()),
    }


def _error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
