"""What blocks hand on to later ones beside the hidden states: keys and values that several blocks share.

Gemma 4's blocks are all called with one dictionary, in which some leave their keys and values for those behind them. So
it is a part of the state between two blocks, and is kept beside the hidden states of each batch. A tensor is kept with
the order of its dimensions in memory, on which the roundings of a product can depend.
Not here: the hidden states (checkpoint/batches.py), why each stream has a dictionary of its own (model/ends.py).
"""

import json
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from llmq.calibration.state import Calibration
from llmq.checkpoint import shards
from llmq.checkpoint.disk import writing
from llmq.guard.reading import metadata, tensor_entries
from llmq.model.lanes import Call

_PROBE = "probe_calls"


def keep(state: Calibration) -> None:
    """Write what was handed on so far beside the hidden states; nothing where blocks share nothing."""
    for name, shared in _shared(state) if state.hidden else ():
        if name.startswith(_PROBE) and not state.dealt.team.leads:
            continue  # all processes have the same
        tensors = {f"{key} {i}": t.cpu() for key, values in shared.items() for i, t in enumerate(values)}
        orders = {n: sorted(range(t.dim()), key=t.stride, reverse=True) for n, t in tensors.items()}
        file = state.hidden.folder / name
        if tensors:
            with writing(file):
                laid = {n: t.permute(orders[n]) for n, t in tensors.items()}
                shards.write(file, laid, {"orders": json.dumps(orders)})


def put_back(state: Calibration) -> None:
    """Put into the arguments of the calls, computed anew, what lies beside the hidden states."""
    for name, shared in _shared(state) if state.hidden else ():
        file = state.hidden.folder / name
        if file.exists():
            orders, kept = json.loads(metadata(file)["orders"]), tensor_entries(file)
            found: dict[str, list[Tensor]] = {}
            for n in sorted(kept, key=lambda n: int(n.rpartition(" ")[2])):
                inverse = [orders[n].index(d) for d in range(len(orders[n]))]
                t = kept[n].read().to(state.hidden.device).permute(inverse)
                found.setdefault(n.rpartition(" ")[0], []).append(t)
            shared.update({key: tuple(values) for key, values in found.items()})


def _shared(state: Calibration) -> Iterator[tuple[str, UserDict[str, Any]]]:
    """Yield the dictionaries that blocks are called with, each once, and the name of its file."""
    kinds: Mapping[str, Sequence[Sequence[Call]]] = {
        "calls": state.calls,
        "float_calls": state.float_calls,
        _PROBE: [state.probe.calls] if state.probe else [],
    }
    for kind, batches in kinds.items():
        for b, calls in enumerate(batches):
            if kind != _PROBE and b not in state.dealt.numbers:
                continue
            values = [v for args, kwargs in calls for v in (*args, *kwargs.values()) if isinstance(v, UserDict)]
            for i, shared in enumerate({id(v): v for v in values}.values()):
                yield f"{kind}-{b:06d}-{i}", shared
