"""The report: what was done to checkpoints and what it cost, as one HTML page that needs nothing else.

    write(["./my-llama-int4"], "report.html", against="./my-llama")
    write(["./a", "./b", "./c.gguf"], "report.html", png="pictures")      several side by side

What it shows is a file of plots/ each; what a checkpoint does not hold is said in its place.
Not here: the command (commands/report.py), what a run records for it (pipeline/channels.py, timings.py).
"""

from collections.abc import Sequence
from pathlib import Path

from llmq import extras
from llmq.checkpoint.disk import renewed, write_text, writing
from llmq.checkpoint.place import check_file, user_path
from llmq.errors import LlmqError
from llmq.progress import Progress, Work

FILE = "report.html"
"""What it is called in OUT, and behind the name of a GGUF file (checkpoint/place.py, `beside`)."""
START = b"<!doctype html>\n<!-- llmq report"
"""How a page begins: only what begins so is overwritten."""
_PNG = b"\x89PNG"


def require() -> None:
    """Raise LlmqError where a package that draws is missing."""
    extras.require(("altair", "vl_convert"), "report", "a report is drawn")


def refuse(html: Path, *, overwrite: bool) -> None:
    """Raise LlmqError where the report cannot be made, or lies there already, before any work."""
    require()
    check_file(html, "the report", START, overwrite=overwrite)


def write(
    outs: Sequence[str | Path],
    html: str | Path,
    *,
    against: str | Path | None = None,
    adapter: str | Path | None = None,
    linear: str | None = None,
    png: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the report of one checkpoint, or of several side by side. Returns the files written, the page first.

    outs: folders, `org/name` or GGUF files, by llmq or, as far as their files tell, by another tool. html: the page.
    against: the float checkpoint that they were made from, which the plot of clipping wants; adapter: what was added to
        it. linear: whose codes and scales are shown; None for the one with the largest error, of the first.
    png: a folder for a picture of each plot. overwrite: replace an earlier report, and its pictures.
    progress: called with how many checkpoints are read, of how many, and what comes next.
    Raises LlmqError where a checkpoint is not there or broken, and where a file cannot be written.
    """
    page_file, folder = user_path(html), None if png is None else user_path(png)
    refuse(page_file, overwrite=overwrite)
    if folder is not None and (folder.exists() and not folder.is_dir()):
        raise LlmqError(f"--png {folder} is a file; name a folder")
    from llmq.report.page import page, pictures, shown
    from llmq.report.read import alike, labels, read

    work, told = Work.of(progress), []
    for i, (out, label) in enumerate(zip(outs, labels(outs), strict=True)):
        work(i, len(outs) + 1, f"reading {label}")
        told.append(read(out, label, linear=linear, against=against, adapter=adapter))
    work(len(outs), len(outs) + 1, "drawing")
    told = told if linear is not None else alike(told)
    drawn = shown(told)
    images = {} if folder is None else {folder / name: data for name, data in pictures(drawn)}
    for file in images:
        if file.exists():
            check_file(file, "--png", _PNG, overwrite=overwrite)
    text = page(drawn, told)
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for file, data in images.items():
        with writing(file), renewed(file) as new:
            new.write_bytes(data)
    write_text(page_file, text)
    work(len(outs) + 1, len(outs) + 1, "done")
    return [page_file, *images]
