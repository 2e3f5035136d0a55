"""Which of several processes this is, as whoever launched them says: torchrun and its like, in the environment.

    RANK, WORLD_SIZE               its number, from 0, and how many there are on all machines
    LOCAL_RANK, LOCAL_WORLD_SIZE   the same on this machine

Without them it is alone; for one that is no number LlmqError is raised.
Not here: what they do together (team.py), which imports torch.
"""

import os

from llmq.errors import LlmqError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def number() -> int:
    """Return the number of this process."""
    return _told("RANK", alone=0)


def size() -> int:
    """Return how many processes there are."""
    return _told("WORLD_SIZE", alone=1)


def number_here() -> int:
    """Return the number of this process on its machine."""
    return _told("LOCAL_RANK", alone=0)


def beside() -> int:
    """Return how many processes share this machine."""
    return _told("LOCAL_WORLD_SIZE", alone=1)


def leads() -> bool:
    """Say whether this process is the one that prints and writes."""
    return number() == 0


def leave() -> None:
    """Work alone from here on, as if nobody had launched several."""
    for name in _NAMES:
        os.environ.pop(name, None)


def ends_first() -> bool:
    """Say whether this process is the first that an error ends: it tells of it, the others follow."""
    try:
        alone, first = size() == 1, leads()
    except LlmqError:  # which is what ends it
        return True
    if alone:
        return True
    import torch.distributed as dist

    if not dist.is_initialized():
        return first  # before anything was dealt, all meet the same error
    try:
        return bool(dist.distributed_c10d._get_default_store().add("llmq ends", 1) == 1)
    except RuntimeError:  # the process that kept the count is gone
        return False


def _told(name: str, alone: int) -> int:
    """Return the number in a variable. Raises LlmqError where that is none."""
    said = os.environ.get(name, alone)
    try:
        return int(said)
    except ValueError as e:
        raise LlmqError(
            f"{name}={said!r} in the environment is no number; start llmq with torchrun, or unset it"
        ) from e
