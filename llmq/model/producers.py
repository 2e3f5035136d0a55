"""Where the input of each site comes from: the norm or linear that can take a scale for its channels, found and proved.

Found by doubling. A module's output channels are multiplied by 1 or 2, by one bit of their index at a time. Powers of
two round nothing: an input channel of a site that comes from channel r alone, by a map that is linear in it, doubles
exactly in the passes of r's bits and stays, bit for bit, in the others. So the bits spell r, for any weights and in any
dtype, in log2 N + 1 forwards of a few tokens:

    q, k, v      <- input_layernorm    channel k from channel k
    o            <- v                  from rows 0..15, 0..15, 16..31, 16..31: two heads share their values
    down         <- gate_up            from the second half of its rows

Proved by undoing. These channels are multiplied by 2, 4 and 8, and divided again where the sites read them: whatever
else read them, in the block or behind it, would show in what the block returns, which must stay, bit for bit.
How a norm stores its gain, and whether attention alone lies between, is tried on a float32 copy, within 1e-3.
Not here: which linears make a site (sites.py), what is done with a producer (folding.py, rotated.py).
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.model.ends import embed
from llmq.model.experts import Experts
from llmq.model.lanes import Call
from llmq.model.sites import discover, overridden
from llmq.model.skeleton import Skeleton
from llmq.model.trial import Change, Trial
from llmq.types import Producer, Site

_TOKENS = 32
_DEAD = "some of their channels are 0 in what was tried"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OWN_NUMBER = {"layer_idx", "layer_id", "layer_number"}  # what tells apart blocks that compute alike


@dataclass(frozen=True)
class Found:
    """The sites of a block with their producers; reasons: why a site has none, by its first linear."""

    sites: tuple[Site, ...]
    reasons: Mapping[str, str]


def of_blocks(skeleton: Skeleton, device: torch.device) -> list[Found]:
    """Return what is found in every block of a model; of blocks that are built alike, the first is loaded and tried.

    Raises LlmqError for linears that are not called exactly once.
    """
    known: dict[Hashable, Found] = {}
    with torch.no_grad():
        entered, calls = entering(skeleton, device)
        hidden = drawn(entered)
        for i, call in enumerate(calls):
            kind = structure(skeleton.blocks[i])
            if kind not in known:
                with skeleton.loaded(i, device) as block:
                    known[kind] = find(block, hidden, call, skeleton.head_dim_of(i), skeleton.config.model_type)
    return [known[structure(block)] for block in skeleton.blocks]


def entering(skeleton: Skeleton, device: torch.device) -> tuple[Tensor, Sequence[Call]]:
    """Return what enters block 0 for a few tokens from all over the vocabulary, `[1, T, H]`, and every block's call."""
    size = len(skeleton.model.get_input_embeddings().weight)
    ids = torch.arange(_TOKENS) * (size // _TOKENS) + size // _TOKENS // 2
    (hidden,), (calls,) = embed(skeleton, [ids[None]], device)
    return hidden, calls


def drawn(hidden: Tensor) -> Tensor:
    """Return random hidden states of the size of these `[1, T, H]`, every other far larger.

    The large ones open gates and ReLUs that text may leave closed, since what attention adds is too small to change
    their direction. In the small ones nothing that a block adds is lost to rounding.
    """
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) * hidden.float().std().cpu()
    noise[:, ::2] *= 32
    return noise.to(hidden)


def structure(block: nn.Module) -> Hashable:
    """Return what is equal for blocks that compute alike: their modules, the shapes of these, and their settings."""
    return tuple(
        (name, type(m), *(tuple(p.shape) for p in m.parameters(recurse=False)), *_settings(m))
        for name, m in block.named_modules()
    )


def _settings(module: nn.Module) -> Iterator[tuple[str, Hashable]]:
    for key, value in vars(module).items():
        if isinstance(value, int | float | str) and key not in _OWN_NUMBER and not key.startswith("_"):
            yield key, value


def find(block: nn.Module, hidden: Tensor, call: Call, head_dim: int, model_type: str = "") -> Found:
    """Return the sites of a loaded block, from what it makes of a few tokens, `[1, T, H]`.

    head_dim: channels of one head. model_type: whose override is asked (families/).
    """
    sites = discover(block, hidden, call)
    with _all_experts_called(block):
        trial = Trial(block, sites, hidden, call)
        producers, reasons = _tried(trial, head_dim)
    found = [replace(s, producer=producers.get(i), parent=trial.parent(s.linears)) for i, s in enumerate(sites)]
    known = overridden(model_type, tuple(found))
    unfound = {sites[i].linears[0]: why for i, why in reasons.items() if i not in producers}
    left = [s.linears[0] for s in known if s.producer is None]
    return Found(known, {name: unfound.get(name, f"the override of {model_type} leaves them") for name in left})


@contextmanager
def _all_experts_called(block: nn.Module) -> Iterator[None]:
    """Call every expert on all tokens, which changes no output, so that there is something to see in each."""
    experts = [(m, m.every) for m in block.modules() if isinstance(m, Experts)]
    for module, _ in experts:
        module.every = True
    try:
        yield
    finally:
        for module, was in experts:
            module.every = was


def _tried(trial: Trial, head_dim: int) -> tuple[dict[int, Producer], dict[int, str]]:
    """Return the producers of the sites, by their index, and why others have none."""
    producers: dict[int, Producer] = {}
    reasons = {i: _unfound(x_TK) for i, x_TK in enumerate(trial.as_it_is.inputs)}
    for name in trial.modules:
        if name not in trial.linears | trial.norms or _same_in_expert_0(trial, name):
            continue
        feeds = _Doubling(trial, name).feeds(head_dim)
        why = _refusal(trial, name, feeds) if feeds else None
        for i, rows_K in feeds.items():
            if why:
                reasons[i] = why
            else:
                producers.setdefault(i, _producer(trial, name, i, rows_K, head_dim))
    alike = _of_other_experts(trial, producers)
    if _undone(trial, [(by.module, i, by.feeding(trial.width(by.module))) for i, by in alike.items()]):
        producers |= alike
    return producers, reasons


def _same_in_expert_0(trial: Trial, name: str) -> str | None:
    """Return the module of expert 0 that stands for another expert's, which is built alike; None for any other."""
    first = _NUMBER.sub("0", name)
    if first == name or not {first, name} <= trial.modules.keys():
        return None
    one, other = trial.modules[first], trial.modules[name]
    return first if type(one) is type(other) and one.weight.shape == other.weight.shape else None


def _of_other_experts(trial: Trial, producers: Mapping[int, Producer]) -> dict[int, Producer]:
    """Return what the sites of other experts come from, where those of expert 0 come from a linear of it."""
    known = {trial.sites[i].linears: by for i, by in producers.items()}
    found = {}
    for i, site in enumerate(trial.sites):
        by = known.get(tuple(_same_in_expert_0(trial, n) or "" for n in site.linears))
        own = _NUMBER.sub(_NUMBER.findall(site.linears[0])[0], by.module) if by else ""
        if by and _same_in_expert_0(trial, own) == by.module:
            found[i] = replace(by, module=own)
    return found


def _unfound(x_TK: Tensor) -> str:
    live = len(x_TK) and x_TK.abs().amax(0).all()
    return "no norm or linear feeds them alone, channel by channel" if live else _DEAD


def _refusal(trial: Trial, name: str, feeds: Mapping[int, Tensor]) -> str | None:
    """Return why a module that feeds these sites cannot take their scales; None where it can."""
    if not _undone(trial, [(name, i, rows_K) for i, rows_K in feeds.items()]):
        return f"{name} feeds something else too"
    if len(feeds) > 1:
        return f"{name} feeds several sites, which would need one scale"
    if name in trial.norms and not trial.gain(name):
        return f"it is not known how {name} stores its gain"
    return None


def _undone(trial: Trial, feeds: Sequence[tuple[str, int, Tensor]]) -> bool:
    """Say whether factors on the channels of modules that feed sites are undone, bit for bit, where these read them.

    feeds: a module, the index of a site, and which channel feeds each of the site's.
    """
    factors = {name: torch.ones(trial.width(name)) for name, _, _ in feeds}
    for name, _, rows_K in feeds:
        factors[name][rows_K] = 2.0 ** (1 + rows_K % 3)
    divided = {n: _times(1 / factors[name][rows_K]) for name, i, rows_K in feeds for n in trial.sites[i].linears}
    now = trial.run({name: _times(factor_N) for name, factor_N in factors.items()}, divided).returned
    return all(torch.equal(a, b) for a, b in zip(now, trial.as_it_is.returned, strict=True))


def _times(factor_N: Tensor) -> Change:
    return lambda out: out * factor_N.to(out)


def _producer(trial: Trial, name: str, i: int, rows_K: Tensor, head_dim: int) -> Producer:
    own = torch.equal(rows_K, torch.arange(trial.width(name)))
    rows = None if own else tuple(rows_K.tolist())
    if name in trial.norms:
        return Producer(name, rows, trial.gain(name))
    heads = heads_of(rows_K, head_dim)
    return Producer(name, rows, per_head=heads is not None and trial.passes_basis(name, heads, i))


def heads_of(rows_K: Tensor, d: int) -> Tensor | None:
    """Return the rows that feed heads of `d` channels each, `[heads, d]`; None where they are not whole heads."""
    if len(rows_K) % d:
        return None
    starts = rows_K[::d].unique()
    each = torch.arange(d)
    whole = torch.equal(rows_K, (rows_K[::d, None] + each).flatten()) and bool((starts.diff() >= d).all())
    return starts[:, None] + each if whole else None


class _Doubling:
    """Which output channels of one module feed the input channels of which sites."""

    def __init__(self, trial: Trial, name: str) -> None:
        self.trial, self.name, self.N = trial, name, trial.width(name)
        self.inputs = {
            i: x
            for i, x in enumerate(trial.as_it_is.inputs)
            if name not in trial.sites[i].linears and len(x) and x.abs().amax(0).all()  # a channel of 0 tells nothing
        }

    def feeds(self, head_dim: int) -> dict[int, Tensor]:
        """Return, for the sites that are fed by it, which channel feeds each of their input channels, int64 `[K]`."""
        found = self._spelled(torch.ones(self.N, dtype=torch.bool))
        if found or self.name not in self.trial.linears:
            return found
        return next((rows for part_N in self._parts(head_dim) if (rows := self._spelled(part_N))), {})

    def _spelled(self, part_N: Tensor) -> dict[int, Tensor]:
        """Return the same, where only a part of the channels is doubled: at once, then by one bit after another."""
        index = torch.arange(self.N)
        doubled = self._doubled(part_N, self.inputs)
        rows = {i: torch.zeros_like(twice_K, dtype=torch.int64) for i, twice_K in doubled.items() if twice_K.all()}
        for bit in range((self.N - 1).bit_length()):
            doubled = self._doubled(part_N & (index >> bit & 1).bool(), rows) if rows else {}
            rows = {i: rows[i] | twice_K.long() << bit for i, twice_K in doubled.items()}
        return rows

    def _doubled(self, which_N: Tensor, sites: Iterable[int]) -> dict[int, Tensor]:
        """Return which input channels double with these, bool `[K]`, for the sites where all others stay."""
        now = self.trial.run({self.name: _times(1 + which_N)}).inputs
        found = {}
        for i in sites:
            was = self.inputs[i]
            if now[i].shape == was.shape:  # an expert may get other tokens
                twice_K = (now[i] == 2 * was).all(0)
                if (twice_K | (now[i] == was).all(0)).all():
                    found[i] = twice_K.cpu()
        return found

    def _parts(self, head_dim: int) -> Iterator[Tensor]:
        """Yield rows of a linear that holds several: those halves, thirds or heads that double what they reach.

        Only of one that has more rows than a site has channels, and without which these are 0.
        """
        nothing = self.trial.run({self.name: torch.zeros_like}).inputs
        wider = [i for i, x in self.inputs.items() if x.shape[1] < self.N and not nothing[i].any()]
        for size in (self.N // 2, self.N // 3, head_dim) if wider else ():
            if size and self.N % size == 0:
                yield self._clean(size, wider)

    def _clean(self, size: int, sites: Sequence[int]) -> Tensor:
        """Return the rows of the parts of that size that double what they reach, until a site is reached as a whole."""
        rows_N, reached = torch.zeros(self.N, dtype=torch.bool), dict.fromkeys(sites, torch.tensor(False))
        for at in reversed(range(0, self.N, size)):  # values, and what is gated, come last
            part_N = torch.arange(self.N) // size == at // size
            doubled = {i: twice_K for i, twice_K in self._doubled(part_N, sites).items() if twice_K.any()}
            rows_N |= part_N & bool(doubled)
            reached |= {i: reached[i] | twice_K for i, twice_K in doubled.items()}
            if any(twice_K.all() for twice_K in reached.values()):
                break
        return rows_N
