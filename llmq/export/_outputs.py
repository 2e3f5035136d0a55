"""What of a run of several outputs is in its place, so that the same command goes on with the rest after any end.

    OUT/.llmq-outputs.json    {"run": what tells this command from others, "before": what each place held at first}

It lies there while the run is unfinished. A place that holds something else than when the run began holds what this run
put there, since outputs take their places whole (docs/files.md); one beside which a stage lies is not done with.
Not here: the outputs (_several.py), a stage (checkpoint/stage.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from llmq.checkpoint.disk import write_text, writing
from llmq.checkpoint.sink import unlike
from llmq.checkpoint.stage import fingerprint, look, stages
from llmq.errors import LlmqError
from llmq.gguf.container import shards
from llmq.guard.reading import json_object

_NAME = ".llmq-outputs.json"


class Outputs:
    """The places of a run's outputs in OUT.

    goes_on: whether an earlier run of this very command began them.
    Raises LlmqError for what a run of another command left, unless it is to be overwritten.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], places: Sequence[Path], *, overwrite: bool) -> None:
        self._file, self._places = out / _NAME, list(places)
        self._run = json.loads(json.dumps(run))
        said = json_object(self._file) if self._file.is_file() else {}
        self.goes_on = said.get("run") == self._run
        if said and not self.goes_on and not overwrite:
            why = unlike(said.get("run") or {}, self._run)
            raise LlmqError(
                f"an earlier run left {out}, unfinished, of another command{why}; move it away, or say --overwrite to "
                "begin anew"
            )
        self._before = said["before"] if self.goes_on else {str(p): _held(p) for p in self._places}

    def done(self, place: Path) -> bool:
        """Say whether an earlier run of this very command has put an output in its place."""
        held = _held(place)
        return self.goes_on and bool(held) and held != self._before.get(str(place)) and not any(stages(place))

    @contextmanager
    def begun(self) -> Iterator[Self]:
        """Keep the file in OUT for as long as the run is unfinished; nothing is left of one that wrote nothing."""
        made = [p for p in (self._file.parent, *self._file.parents[1:]) if not p.exists()]
        with writing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps({"run": self._run, "before": self._before}, indent=2) + "\n")
        try:
            yield self
        except BaseException:
            if not self.goes_on and not any(any(stages(p)) or _held(p) != self._before[str(p)] for p in self._places):
                self._file.unlink()
                with suppress(OSError):  # someone else uses it by now
                    for folder in made:
                        folder.rmdir()
            raise
        self._file.unlink()


def _held(place: Path) -> Any:
    """Return what a place is known by; nothing where it is empty."""
    if place.is_dir():
        return fingerprint(place)
    return [seen for p in (place, *shards(place)) if (seen := look(p))]
