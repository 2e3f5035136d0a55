"""`llmq export`: the run around a target, from what the user wrote to OUT in its place.

Not here: what a target is (_target.py), the targets.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from llmq import registry
from llmq.checkpoint.place import one_file, user_path
from llmq.errors import LlmqError, printable
from llmq.export._as_format import AsFormat
from llmq.export._target import OfCodes, Target
from llmq.formats._folder import Folder, FolderFormat
from llmq.progress import Progress

_DECODED = "embeddings=float"  # of any format: what it may not hold and often is not wanted packed


def export(
    src: str,
    out: Path,
    to: str | None = None,
    *,
    requantize: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    progress: Progress | None = None,
    **short: str | None,
) -> dict[str, Any]:
    """Write the quantized checkpoint SRC as what `to` names. Returns what its target says of the run.

    to: `TARGET[:option=value...]`; None goes by the suffix of OUT. requantize: what a linear is rounded to anew whose
    codes cannot be kept; None refuses it. check: whether what was written is read again before it becomes OUT.
    short: options of the target by their names, as `to` has them.
    Raises LlmqError where SRC is no quantized checkpoint, its codes cannot be kept, or what was written is wrong; OUT
    is then untouched.
    """
    target = _target(to, out, {name: value for name, value in short.items() if value is not None})
    if user_path(src).exists():
        target.sink(out, overwrite=overwrite, reads={"SRC": user_path(src)})  # refuses before anything is read
    target.require()
    opened = target.open(src, requantize)
    opened.warnings += target.check(opened)
    if isinstance(target, OfCodes):
        target.refuse_falling(opened)
    run = {"command": "export", "SRC": target.seen(opened.source), "to": target.said(), "requantize": requantize}
    reads = {"SRC": opened.source.path}
    with target.sink(out, overwrite=overwrite, reads=reads, run=run, again=True) as sink:
        if sink.earlier is not None:
            sink.commit()
            return sink.earlier
        sink.require(2 * opened.source.bytes())
        done = target.write(opened, sink, progress or (lambda done, total, what: None))
        sink.promise = lambda: "the same command begins anew"
        if check:
            target.verify(sink)
        sink.seal(done)
        sink.commit()
    return done


def _target(to: str | None, out: Path, short: Mapping[str, str]) -> Target[Any]:
    """Return what a user's texts name. Raises LlmqError for two that disagree, and for a suffix that is not its own."""
    text = to or ("gguf" if one_file(out) else None)
    if text is None:
        raise LlmqError(f"--to is not given and {out} has no suffix that says it; say --to TARGET ({_names()})")
    target = named(text)
    if target.suffix and not one_file(out):
        raise LlmqError(f"--to {text} writes a file; call it {out}{target.suffix}")
    if not target.suffix and one_file(out):
        raise LlmqError(f"--to {text} writes a folder; leave {out.suffix} out of its name")
    return target.with_options(short, f"--to {text}")


def named(text: str, option: str = "--to") -> Target[Any]:
    """Return the target that a text names: a file of this folder, or a format whose checkpoints are folders.

    option: of the command line, for the message of a text that names none.
    """
    name = registry.words(text)[0]
    if name.replace("-", "_") in registry.names("export"):
        target: Target[Any] = registry.load("export", text)
        return target
    if not registry.is_code(name) and name not in _names().split(", "):
        raise LlmqError(f"{option} {printable(repr(name), 80)} is no target (there are: {_names()})")
    own, floats = [w for w in registry.words(text) if w != _DECODED], _DECODED in registry.words(text)
    form: Any = registry.load("formats", ":".join(own), code=True)
    if not isinstance(form, Folder):
        raise LlmqError(f"{option} {name}: {type(form).__name__} is no format of a checkpoint folder")
    return AsFormat(cast(FolderFormat, form), name, floats)


def _names() -> str:
    formats = (n.replace("_", "-") for n in registry.names("formats"))
    return ", ".join(sorted({*registry.names("export"), *formats, *registry.SHORT["formats"]}))
