"""Regular expressions that a stranger may have written: those of a checkpoint's config, those of a recipe.

By mistake or by malice they can take exponential time. An engine that is linear by construction would do without a
clock, but has no lookarounds, which peers' files use (`re:^(?!.*experts).*$`); so they run in `regex`, whose matches
take a limit. What Python's own engine does not know (recursion, fuzzy matches) is refused, as everybody else does.
Not here: what a pattern selects (formats/_reading.py, pipeline/method.py).
"""

import re
import time
import warnings
from collections.abc import Callable

import regex

from llmq.errors import LlmqError, one_line, printable

_SECONDS = 1.0
# seconds that cost nothing, several times what a slow machine takes: a long list of sane patterns has no limit
_USUAL_COMPILATION, _USUAL_MATCH = 5e-3, 1e-4
_LONGEST = 100_000  # characters; a budget of bits writes the names of all linears in one pattern


class Limit:
    """What patterns may take of the processor together, in seconds, beyond what each usually takes."""

    def __init__(self) -> None:
        self.left = _SECONDS

    def spend(self, start: float, usual: float) -> bool:
        """Count the time since `start`; return whether some is left."""
        self.left -= max(0.0, time.thread_time() - start - usual)
        return self.left > 0 or self.end()

    def end(self) -> bool:
        """Leave a little for who asks again, since less than 0 would be no limit to `regex`; return False."""
        self.left = 1e-3
        return False


class Pattern:
    """A regular expression.

    said: what it is, for errors. limit: shared with others; its own without.
    Raises LlmqError where it is none, or is too long.
    """

    def __init__(self, text: str, said: str, limit: Limit | None = None) -> None:
        self.pattern, self.said, self._limit = text, printable(said, 120), limit or Limit()
        if len(text) > _LONGEST:
            raise LlmqError(f"{self.said} has {len(text):,} characters; {_LONGEST:,} are read")
        start = time.thread_time()
        try:
            with warnings.catch_warnings(action="ignore"):
                re.compile(text)
                self._compiled = regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as e:
            raise LlmqError(f"{self.said} is not a regular expression ({one_line(e)})") from e
        if not self._limit.spend(start, _USUAL_COMPILATION):
            raise LlmqError(f"{self.said} takes too long to read; write it simpler")

    def search(self, name: str) -> bool:
        """Say whether the pattern is found in `name`. Raises LlmqError where that takes too long."""
        return self._run(self._compiled.search, name)

    def match(self, name: str) -> bool:
        """Say whether `name` starts with a match. Raises LlmqError where that takes too long."""
        return self._run(self._compiled.match, name)

    def _run(self, find: Callable[..., object], name: str) -> bool:
        start = time.thread_time()
        try:
            found = find(name, timeout=self._limit.left) is not None
            in_time = self._limit.spend(start, _USUAL_MATCH)
        except TimeoutError:
            in_time = self._limit.end()
        if not in_time:
            raise LlmqError(f"{self.said} takes more than {_SECONDS:.0f} second on {name}; write it simpler")
        return found
