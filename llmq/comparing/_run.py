"""`llmq compare`: candidates quantized one after the other, measured on the same tokens, set side by side.

    plan all, refusing what `quantize` would -> quantize each, or export it from the solve of an earlier one
        -> score all against the float model, run once -> speed -> front, advice, report

Two candidates share a solve where their recipes differ in the format alone and the second holds the first's codes
(export/_several.py). Others share the float model's states and the text, not the calibration's hidden states: those
are of quantized blocks, which differ.
A GGUF file is scored by its weights, decoded: what llama.cpp's own kernels round is not in it.
Not here: the words of candidates (candidates.py), the rows (results.py), the command (commands/compare.py).
"""

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmq import api, report
from llmq.checkpoint import resolve
from llmq.checkpoint.disk import renewed, writing
from llmq.checkpoint.place import user_path
from llmq.checkpoint.shards import write
from llmq.checkpoint.stage import fingerprint, look
from llmq.comparing import results
from llmq.comparing.candidates import candidates
from llmq.comparing.hardware import gpu, runs
from llmq.comparing.results import Comparison, Row, as_json
from llmq.comparing.speed import measured, tokens_per_second
from llmq.errors import LlmqError
from llmq.evaluation.scores import refuse
from llmq.evaluation.tokens import Against, Tokens
from llmq.evaluation.windows import find_convention
from llmq.export import _several as outputs
from llmq.guard.reading import tensor_entries
from llmq.options import memory_size, spelled
from llmq.pipeline.plan import Plan
from llmq.progress import Listener, Progress, Work

_OF_TEXT = ("text", "dataset", "convention", "window", "windows")


def compare(  # noqa: PLR0913, options, one for one
    src: str | Path,
    schemes: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    named: Mapping[str, Mapping[str, Any]] | None = None,
    text: str | Path | None = None,
    dataset: str = "wikitext2",
    convention: str = "gptq",
    window: int | None = None,
    windows: int | None = None,
    budget: str | None = None,
    on: str | None = None,
    html: str | Path | None = None,
    keep: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    warn: Callable[[str], Any] = warnings.warn,
    progress: Progress | Listener | None = None,
    **options: Any,
) -> Comparison:
    """Quantize a checkpoint in several ways and say what each costs: size, perplexity, KL, top-1, seconds, speed here.

    schemes: short words, "w4a16,awq,q4_k_m,w8a8" (candidates.py), or options of `quantize` by a name of yours; named:
        more of the latter.
    text, dataset, convention, window, windows: what is scored, as in `evaluate`. options: of `quantize`, for all
        candidates for which they mean something: calib, samples, group_size ...
    budget: "6GiB", beyond which a candidate is marked. on: a GPU that is to run it, "RTX 4090".
    html: where to write the report (report/), which `overwrite` replaces. keep: a folder for the checkpoints and what
        is finished of the comparison, which goes on there when it was interrupted; without one, nothing is kept.
    Raises LlmqError, before any work, for what `quantize` or `evaluate` would refuse, and where a candidate in
        `keep` has other options.
    """
    given = {} if isinstance(schemes, str) or not isinstance(schemes, Mapping) else schemes
    words = schemes.split(",") if isinstance(schemes, str) else () if given else schemes
    own = {name: dict(o) for name, o in [*given.items(), *(named or {}).items()]}
    chosen = candidates(words, own, {n: spelled(v) for n, v in options.items()})
    most, where = None if budget is None else memory_size("--budget", budget), None if on is None else gpu(on)
    scored = {"text": text, "dataset": dataset, "convention": convention, "window": window, "windows": windows}
    _refuse(scored, html, overwrite=overwrite)
    plans = {name: api.outlined(src, None, None, o, device=device) for name, o in chosen.items()}
    work, found = Work.of(progress), Comparison(str(src), [])
    with ExitStack() as stack:
        folder = _folder(keep, stack)
        run = {"src": fingerprint(resolve(str(src)))}
        known = results.kept(folder, run)
        save = partial(results.save, folder, run, known, found.rows)
        outs = {name: folder / (f"{name}.gguf" if plans[name].method.recipe.gguf else name) for name in chosen}
        _refuse_taken(chosen, outs, known)
        how = {"device": device, "warn": warn, "progress": work}
        for name, row in _made(src, chosen, plans, outs, known, save, how):
            row.readers = [r.runtime for r in plans[name].readers() if r.accepts]
            if where is not None:
                row.runs, row.note = runs(plans[name].method.recipe, row.bytes, where)
            found.rows.append(row)
            save()
        _score(src, found, folder, scored, device, work)
        _time(found, device, work, save)
        results.mark(found.rows, most)
        found.float_bytes = plans[found.rows[0].name].source.bytes()
        found.advice = results.advice(found, most, where.name if where else None)
        save()
        if html is not None:
            report.write([r.out for r in found.rows], html, against=src, overwrite=overwrite, progress=work)
    return found


def _refuse(scored: Mapping[str, Any], html: str | Path | None, *, overwrite: bool) -> None:
    """Refuse, before any work, a text that is not there, a convention that is none, a report that cannot be made."""
    refuse(scored["windows"], None)
    find_convention(scored["convention"], scored["window"])
    if scored["text"] is not None and not user_path(scored["text"]).exists():
        raise LlmqError(f"--text {scored['text']} is not there; name a file or a folder of texts")
    if html is not None:
        report.refuse(user_path(html), overwrite=overwrite)


def _folder(keep: str | Path | None, stack: ExitStack) -> Path:
    """Return where candidates are written: the folder that keeps them, or one that goes when all is said."""
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmq-compare-")))
    folder = user_path(keep)
    if folder.exists() and not folder.is_dir():
        raise LlmqError(f"--keep {folder} is a file; name a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_taken(chosen: Mapping[str, dict[str, Any]], outs: Mapping[str, Path], known: Mapping[str, Row]) -> None:
    """Refuse to replace what lies where a candidate goes and is not known to be of the same options."""
    for name, out in outs.items():
        if out.exists() and not (name in known and known[name].of(chosen[name])):
            raise LlmqError(
                f"{out} is there and is not known to be of the options of {name}; give another name or another --keep, "
                f"or remove {out}"
            )


def _made(
    src: str | Path,
    chosen: Mapping[str, dict[str, Any]],
    plans: Mapping[str, Plan],
    outs: Mapping[str, Path],
    known: dict[str, Row],
    save: Callable[[], None],
    how: dict[str, Any],
) -> Iterator[tuple[str, Row]]:
    """Yield each candidate quantized, or as an earlier comparison left it; what is begun is known before, and saved."""
    rows = dict[str, Row]()
    for name, options in chosen.items():
        out, old = outs[name], known.get(name)
        if old is not None and old.bytes and old.of(options) and out.exists():
            rows[name] = replace(old, out=str(out))
        else:
            known[name] = Row(name, as_json(options), str(out))
            save()
            giver = next((r for n, r in rows.items() if not r.shares and _shares(plans[n], plans[name])), None)
            rows[name] = _quantized(src, name, options, out, giver, how)
        yield name, rows[name]


def _shares(a: Plan, b: Plan) -> bool:
    """Say whether b's codes are a's: recipes that differ in the format alone, and b's holds what a's solve gives."""
    of_a, of_b = a.method.recipe, b.method.recipe
    if of_a.gguf or of_b.gguf or of_a.format == of_b.format or replace(of_a, format=of_b.format) != of_b:
        return False
    try:
        outputs.foresee(a, str(of_b.format))
    except LlmqError:
        return False
    return True


def _quantized(
    src: str | Path, name: str, options: dict[str, Any], out: Path, giver: Row | None, how: dict[str, Any]
) -> Row:
    """Return a candidate's row, once it is written: solved, or exported from the solve of another."""
    began, rest = time.perf_counter(), {k: v for k, v in how.items() if k != "device"}
    if giver is not None:
        done = api.convert(giver.out, out, str(options["format"]), overwrite=out.exists(), **rest)
        size, bits = int(done["bytes"]), giver.bits_per_weight
    else:
        record = api.quantize(src, out, overwrite=out.exists(), **how, **options)
        size, bits = int(record["size"]["bytes"]), record["size"].get("bits_per_weight")
    seconds, shares = time.perf_counter() - began, None if giver is None else giver.name
    return Row(name, as_json(options), str(out), size, bits, seconds, shares)


def _score(
    src: str | Path, found: Comparison, folder: Path, scored: Mapping[str, Any], device: str, work: Work
) -> None:
    """Fill in the figures of all rows, and how they differ; those that were scored before are not run again."""
    of_text = {k: str(v) for k, v in scored.items()} | {"src": fingerprint(resolve(str(src)))}
    held = TokenFiles(folder / results.TOKENS, json.dumps(of_text | _text_seen(scored["text"])))
    told = {k: v for k, v in scored.items() if k in _OF_TEXT}
    outs = [row.out for row in found.rows]
    measured = api.evaluate_all(outs, baseline=src, device=device, keep=True, held=held, progress=work, **told)
    for row in found.rows:
        row.evaluation = measured.evaluations[row.out].to_json()
    found.pairs = [p.to_json() for p in measured.pairs]


def _text_seen(text: str | Path | None) -> dict[str, Any]:
    """Return what tells that a text is the one that was scored: sizes and times of its files."""
    if text is None:
        return {}
    path = user_path(text)
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return {"files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]}


def _time(found: Comparison, device: str, work: Work, save: Callable[[], None]) -> None:
    """Fill in how fast each row writes here, where that is not known and what runs it is installed; save each."""
    for row in found.rows:
        if row.speed is None and measured(row.out):
            work(0, 1, f"speed of {row.name}")
            row.speed = tokens_per_second(row.out, device)
            save()


class TokenFiles:
    """The scored tokens of checkpoints by path, in files of a folder: a `TokenStore`. key: of the text, in words."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def _file(self, name: str) -> Path:
        path = Path(name)
        seen = fingerprint(path) if path.is_dir() else repr(look(path))
        return self._folder / f"{path.name}-{hashlib.sha256((self._key + seen).encode()).hexdigest()[:16]}"

    def __getitem__(self, name: str) -> Tokens:
        file = self._file(name)
        if not file.is_file():
            raise KeyError(name)
        found = {n: e.read() for n, e in tensor_entries(file).items()}
        truth = Against(found.pop("truth.nll"), found.pop("truth.kl"), found.pop("truth.agree"))
        return Tokens(**found, truth=truth)

    def __setitem__(self, name: str, tokens: Tokens) -> None:
        truth = {} if tokens.truth is None else {f"truth.{n}": t for n, t in vars(tokens.truth).items()}
        own = {n: t for n, t in vars(tokens).items() if n != "truth"}
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            with renewed(self._file(name)) as new:
                write(new, own | truth)

    def __contains__(self, name: object) -> bool:
        return self._file(str(name)).is_file()
