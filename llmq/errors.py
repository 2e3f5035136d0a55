"""The one kind of error that a user is meant to read: a line that names the thing and the remedy.

Text of files ends up in these lines (tensor names, keys, other libraries' messages), so they are made printable here:
no terminal escape, no second line, no half of a surrogate pair gets through.
"""

_LONGEST = 2000  # characters of a message; a hostile file can put megabytes into a name


class LlmqError(Exception):
    """A failure that a user can mend: one line that names the thing and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, _LONGEST))

    def __str__(self) -> str:
        """Return the message and what was noted on its way: where finished work was left."""
        return "; ".join([super().__str__(), *notes(self)])


def printable(text: str, longest: int | None = None) -> str:
    r"""Return `text` as one line that a terminal only prints: `"a\nb \x1b[2J"` becomes `"a b \\x1b[2J"`.

    longest: characters to keep; what is cut is marked by dots. White space of any kind becomes one space.
    """
    flat = " ".join(text.split())
    shown = flat
    if not flat.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 3] + "..."


def one_line(e: BaseException, longest: int = 300) -> str:
    """Return an exception's text as one printable line; its class where it has none."""
    said = str(getattr(e, "strerror", None) or e)
    return printable(said, longest) or type(e).__name__


def notes(e: BaseException | None) -> list[str]:
    """Return what was noted (PEP 678) on an exception and on those that it came from, printable."""
    found: list[str] = []
    while e is not None:
        found += [printable(n, _LONGEST) for n in getattr(e, "__notes__", []) if printable(n, _LONGEST) not in found]
        e = None if isinstance(e, LlmqError) else e.__cause__ or e.__context__
    return found
