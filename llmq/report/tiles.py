"""What a report says first of one checkpoint: its figures in large, and a line on how it was made."""

from collections.abc import Iterator
from typing import NamedTuple

from llmq.report.read import Told
from llmq.show import span


class Tile(NamedTuple):
    """A figure, what it is, and what it is beside something else."""

    what: str
    value: str
    more: str = ""


def about(one: Told) -> str:
    """Return how a checkpoint was made, in a line."""
    source, recipe = one.of("source", dict, {}), one.of("recipe", dict, {})
    if not source:
        return f"{one.method}; another tool made it, so nothing but its files tells of it"
    bits = recipe.get("type") or (f"{recipe['bits']} bits" if recipe.get("bits") else "")
    of = [one.method, str(bits), one.steps]
    return f"Quantized by llmq {one.record.get('llmq', '')} from {source.get('name')}: {', '.join(x for x in of if x)}"


def tiles(one: Told) -> Iterator[Tile]:
    """Yield the figures that are known."""
    whole, bits = one.sized("float_bytes"), one.sized("bits_per_weight")
    yield Tile(
        "size", f"{one.size / 1e6:,.1f} MB", f"of {whole / 1e6:,.1f} MB, {one.size / whole:.0%}" if whole else ""
    )
    if bits:
        yield Tile("bits a weight", f"{bits:.3f}", "scales and zeros counted")
    for kind in ("output", "weight"):
        if (mean := one.mean(kind)) is not None:
            worst = max(e for line in one.lines if (e := line.error(kind)) is not None)
            yield Tile(f"mean {kind} error", f"{mean:.2e}", f"the worst {worst:.2e}")
    yield from _scores(one)
    trouble = sum(bool(line.trouble) for line in one.lines)
    if one.lines:
        yield Tile("with trouble", f"{trouble:,}", f"of {len(one.lines):,} linears")
    if one.timings:
        yield Tile("time", span(one.timings.seconds), f"{one.timings.most / 1e9:.2f} GB of memory at most")


def _scores(one: Told) -> Iterator[Tile]:
    found = one.figures
    after, before, kl = (found.get(key) for key in ("perplexity", "baseline_perplexity", "kl_mean"))
    if after:
        yield Tile("perplexity", f"{after:.3f}", f"float {before:.3f}, {after / before - 1:+.2%}" if before else "")
    if kl is not None:
        high = found.get("kl_p99")
        yield Tile("KL", f"{kl:.4f}", f"99 % below {high:.3f} nats" if high else "nats a token")
    if (top1 := found.get("top1")) is not None:
        yield Tile("top-1", f"{top1:.1%}", "of the float model's first choices kept")
