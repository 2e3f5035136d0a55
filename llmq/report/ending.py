"""The report at the end of a run: `llmq quantize --report`.

    refuse(out, overwrite=False)              before any work
    times = Timings()                         hears of the run
    end(out, times, src, adapter)             OUT/report.html and OUT/timings.json; of OUT.gguf beside it

Not here: the report of what is there already (write, in this folder's __init__.py).
"""

from pathlib import Path

from llmq import report
from llmq.checkpoint.place import beside, check_file, one_file, user_path
from llmq.errors import LlmqError
from llmq.report.timings import FILE, Timings


def refuse(out: str | Path, *, overwrite: bool) -> None:
    """Raise LlmqError where no report could be written when OUT is whole. One in a folder goes with the folder."""
    report.require()
    if one_file(path := user_path(out)) and path.parent.is_dir():
        check_file(beside(path, report.FILE), "--report", report.START, overwrite=overwrite)
        check_file(beside(path, FILE), "--report", b"{", overwrite=overwrite)


def end(out: str | Path, times: Timings, src: str | Path, adapter: str | Path | None) -> Path:
    """Write the times of a run and the report. Returns the page.

    src, adapter: what OUT was made from. Raises LlmqError where that cannot be, and says that OUT is whole.
    """
    path = user_path(out)
    page = beside(path, report.FILE)
    try:
        times.save(beside(path, FILE))
        report.write([path], page, against=src, adapter=adapter, overwrite=True)
    except LlmqError as e:
        e.add_note(f"{out} is whole: llmq report {out} --against {src} makes the report")
        raise
    return page
