"""What quantization cost: perplexity, KL divergence and top-1 agreement, by the conventions that others publish.

    perplexity = exp(-sum_t log q(t) / n)      q: the model, over the scored tokens t; n: tokens, or words
    KL         = mean_t sum_v p_t(v) log(p_t(v) / q_t(v))      p: the float baseline, at the same positions
    top-1      = share of positions where argmax p = argmax q

Perplexity alone misleads, since it can fall while the model drifts from the baseline; KL cannot. Standard errors take
tokens as independent, as llama.cpp does; `kl_interval` does not (paired.py).

Not here: which windows of a text are scored (windows.py), what every token got (tokens.py), loading models (loading),
text to calibrate on (calibration).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.evaluation import paired
from llmq.evaluation.classes import CLASSES, classes
from llmq.evaluation.tokens import Against, Predicts, Tokens, score
from llmq.evaluation.windows import Convention, Part, Passages, Text, passages
from llmq.model.pretrained import check_ids
from llmq.show import Rows
from llmq.types import LlmqError

KV_CHUNK = 32
"""Tokens fed at once where the key-value cache is quantized: with whole windows nothing would be read back from it."""
BUCKETS = 16
"""Into how many ranges of positions KL by position is parted at most."""


@dataclass(frozen=True)
class Evaluation:
    """One model measured on one text.

    perplexity: per `unit` ("token" or "word"), with its standard error; byte_perplexity for unit "word".
    count: how many units the text has; tokens: how many were scored; seconds: wall time, the baseline's included.
    baseline_perplexity, kl_mean and its standard error (nats per token), kl_p99 and kl_p999 (99 and 99.9 percentile
        over the tokens) and top1 (share, 0 to 1): against the baseline, None without one, like all that follows.
    kl_interval: 95 % interval of kl_mean, whose tokens vary together within a window (paired.py).
    kl_by_position: [first, mean KL] for ranges of positions in the window, each to the next one's first.
    classes: by class of the token that is predicted (classes.py), `tokens`, `top1` and `kl_mean`.
    categories: of a folder of texts, by text: `tokens`, `perplexity`, `baseline_perplexity`, `kl_mean`, `kl_interval`,
        `kl_p99`, `top1`; None for one text.
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
    kl_p99: float | None = None
    kl_p999: float | None = None
    top1: float | None = None
    kl_interval: list[float | None] | None = None
    kl_by_position: list[list[float]] | None = None
    classes: dict[str, dict[str, float]] | None = None
    categories: dict[str, dict[str, Any]] | None = None
    kv_bits: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `json.dumps` takes them; infinite values become None."""
        found: dict[str, Any] = _finite(dataclasses.asdict(self))
        return found


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
    text: Text | Mapping[str, Text],
    convention: Convention,
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure what predicts, in memory whole or block by block, against the truth where there is one; see `evaluate`.

    Raises LlmqError for a text that is too short, a window longer than the model reads, a baseline with another
    vocabulary, and logits that are not finite (naming the window).
    """
    began = time.perf_counter()
    pieces = prepare(scored.model, tokenizer, text, convention, windows)
    require_same_vocabulary(scored, truth)
    tokens = score(pieces.windows, scored, truth, progress)
    return figures(tokens, pieces, tokenizer, time.perf_counter() - began, scored.kv_bits)


def prepare(
    model: Any, tokenizer: Any, text: Text | Mapping[str, Text], convention: Convention, windows: int | None
) -> Passages:
    """Return the windows of a text, or of several by category. Raises LlmqError as `measure` does."""
    pieces = passages(text if isinstance(text, Mapping) else {"": text}, tokenizer, model, convention, windows)
    check_ids([i for w in pieces.windows for i in w.ids], model)
    return pieces


def require_same_vocabulary(scored: Predicts, truth: Predicts | None) -> None:
    """Raise LlmqError where model and baseline tell different numbers of tokens apart."""
    if truth and truth.vocab != scored.vocab:
        raise LlmqError(f"the baseline has {truth.vocab} tokens in its vocabulary, the model {scored.vocab}")


def figures(tokens: Tokens, pieces: Passages, tokenizer: Any, seconds: float, kv_bits: int | None = None) -> Evaluation:
    """Return the figures over all tokens that were scored, and by category where there are several."""
    of = {name: _perplexities(tokens.of(part.windows), part, pieces.how) for name, part in pieces.parts.items()}
    several = {} if list(of) == [""] else {"categories": of}
    more = {} if tokens.truth is None else _spread(tokens, tokens.truth) | _by_class(tokens, tokens.truth, tokenizer)
    how, shown = pieces.how, _perplexities(tokens, pieces.whole, pieces.how) | more | several
    return Evaluation(how.name, how.window, how.unit, seconds=seconds, kv_bits=kv_bits, **shown)


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

    def ready(self) -> AbstractContextManager[None]:
        """See `Predicts.ready`: the head is in memory all the time."""
        return nullcontext()

    def rest(self) -> None:
        """See `Predicts.rest`."""
        self.model = None

    def _forward(self, x: Tensor, **cache: Any) -> Tensor:
        if self.head is None:
            return self.model(x, **cache).logits[0]
        return self.model.base_model(x, **cache).last_hidden_state[0]

    def log_probs(self, states: Tensor) -> Tensor:
        """Return the float32 log-probabilities `[T, vocab]` of some of the states."""
        return F.log_softmax((states if self.head is None else self.head(states)).float(), dim=-1)


def _perplexities(tokens: Tokens, part: Part, how: Convention) -> dict[str, Any]:
    """Return the fields of Evaluation that a category has too."""
    count = part.words if how.unit == "word" else len(tokens)
    nll = float(tokens.nll.sum())
    perplexity = _exp(nll / count)
    found: dict[str, Any] = {
        "perplexity": perplexity,
        "standard_error": perplexity * _error(tokens.nll) * len(tokens) / count,
    }
    found |= {"count": count, "tokens": len(tokens)}
    found |= {"byte_perplexity": _exp(nll / part.bytes) if how.unit == "word" else None}
    if (truth := tokens.truth) is None:
        return found
    return found | {
        "baseline_perplexity": _exp(float(truth.nll.sum()) / count),
        "kl_mean": float(truth.kl.mean()),
        "kl_interval": paired.mean(truth.kl, paired.clusters(tokens.window)).interval,
        "kl_p99": _percentile(truth.kl, 0.99),
        "top1": float(truth.agree.double().mean()),
    }


def _spread(tokens: Tokens, truth: Against) -> dict[str, Any]:
    """Return the fields that say how KL is spread: over tokens, and over positions in the window."""
    first, end = int(tokens.position.min()), int(tokens.position.max()) + 1
    edges = torch.logspace(math.log10(first), math.log10(end), BUCKETS + 1).round().long().unique()[:-1]
    place = torch.bucketize(tokens.position, edges, right=True) - 1
    means = [(int(edge), truth.kl[place == i]) for i, edge in enumerate(edges)]
    return {
        "kl_standard_error": _error(truth.kl),
        "kl_p999": _percentile(truth.kl, 0.999),
        "kl_by_position": [[edge, float(kl.mean())] for edge, kl in means if len(kl)],
    }


def _by_class(tokens: Tokens, truth: Against, tokenizer: Any) -> dict[str, Any]:
    """Return the field `classes`: those that the text has, in the order of `CLASSES`."""
    found, of = classes(tokens.ids, tokens.before, tokenizer), {}
    for i, name in enumerate(CLASSES):
        kl, agree = truth.kl[found == i], truth.agree[found == i]
        if len(kl):
            of[name] = {"tokens": len(kl), "top1": float(agree.double().mean()), "kl_mean": float(kl.mean())}
    return {"classes": of}


def _percentile(values: Tensor, share: float) -> float:
    """Return the least of the values that is not below so large a share of them."""
    return float(values.sort().values[math.ceil(share * len(values)) - 1])


def _error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _finite(value: Any) -> Any:
    """Return a value of JSON with None for numbers that it does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
