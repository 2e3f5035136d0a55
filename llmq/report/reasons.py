"""Why a linear is among the worst, as far as its record and its weights tell.

    reasons(told, line)   ["few tokens: 40 for 64 columns", "2 bits, where most have 4",
                           "input channel 138 stands 95 times above the median one"]

Trouble with its numbers comes first: that was recorded. The rest are thresholds of ours on what makes a matrix hard to
round: fewer bits, channels of the input that dwarf the others, weights far outside of the bulk.
Not here: what is done about them.
"""

from collections.abc import Iterator
from statistics import median, mode

from llmq.errors import LlmqError
from llmq.report.read import Line, Told

_CHANNEL = 20.0  # times the median channel
_WEIGHT = 12.0  # times the root mean square; of a million Gaussian weights the largest is 5
_WEIGHTS = 2**26  # of a linear that is read for this


def reasons(one: Told, line: Line, *, look: bool = True) -> list[str]:
    """Return what is known, in words; at least how far the error lies above that of others of its name.

    look: whether its weights are read.
    """
    found = [f"{kind}: {words}" for kind, words in line.trouble.items()]
    found += [*_bits(one, line), *_channels(one, line), *(_weights(one, line) if look else ())]
    return found or [_above(one, line)]


def _bits(one: Told, line: Line) -> Iterator[str]:
    known = [x.bits for x in one.lines if x.bits is not None]
    usual = mode(known) if known else None
    if line.bits is not None and usual is not None and line.bits < usual:
        yield f"{line.bits:g} bits, where most have {usual:g}"


def _channels(one: Told, line: Line) -> Iterator[str]:
    entries = [e for e in one.channels if line.name in e.linears]
    for entry in entries[-1:]:  # as it was solved, where that is known
        if entry.above > _CHANNEL:
            yield f"input channel {entry.channel} stands {entry.above:.3g} times above the median one"


def _weights(one: Told, line: Line) -> Iterator[str]:
    try:
        q = one.weights.read(line.name).q
    except (LlmqError, KeyError):  # a record of other linears than the file has; the plots of codes say what is wrong
        return
    if q.codes.numel() > _WEIGHTS:
        return
    W_NK = q.dequantize()
    above = float(W_NK.abs().max() / W_NK.square().mean().sqrt().clamp(min=1e-30))
    if above > _WEIGHT:
        yield f"its largest weight is {above:.3g} times their root mean square"


def _above(one: Told, line: Line) -> str:
    alike = [e for x in one.lines if x.leaf == line.leaf and (e := x.error(one.kind)) is not None]
    times = (line.error(one.kind) or 0.0) / max(median(alike), 1e-30)
    return f"nothing stands out; {times:.2g} times the median of all {line.leaf}"
