"""Options that a command takes from others by name, so that their words and defaults stand in one place.

    @borrowing({quantize: ["calib", "samples"]})
    def compare(src: ..., **options: Any) -> None: ...        # --calib and --samples as `llmq quantize` has them

Not here: the options themselves (quantize.py, measure.py).
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

Command = Callable[..., None]
CommandT = TypeVar("CommandT", bound=Command)


def borrowing(lenders: Mapping[Command, Collection[str]]) -> Callable[[CommandT], CommandT]:
    """Give a command that takes `**options` those of other commands behind its own, for typer to read."""

    def borrow(command: CommandT) -> CommandT:
        own = {n: p for n, p in inspect.signature(command).parameters.items() if p.kind is not p.VAR_KEYWORD}
        lent = {
            n: p
            for lender, names in lenders.items()
            for n, p in inspect.signature(lender).parameters.items()
            if n in names and n not in own
        }
        every = sorted([*own.values(), *lent.values()], key=lambda p: p.default is not p.empty)
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every}
        return command

    return borrow
