"""Several outputs of one solve: `llmq quantize SRC OUT --format gptq,gguf:Q4_0,onnx`.

    OUT/gptq/          the first format, in which the solve is written
    OUT/OUT.gguf       each other exported from it, its codes kept: `llmq export OUT/gptq OUT/OUT.gguf --to gguf:Q4_0`
    OUT/onnx/

What a target cannot share is refused before any work, as far as the plan tells: grids, groups, activation order.
Not here: the solve (pipeline/), the export (_run.py), what of an unfinished run is done (_outputs.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from llmq import registry
from llmq.checkpoint.place import one_file
from llmq.errors import LlmqError
from llmq.export._as_format import AsFormat
from llmq.export._run import named
from llmq.export._target import OfCodes, Packed
from llmq.pipeline.plan import Plan
from llmq.types import RangedGrid

_SCALED = "compressed-tensors"  # the format whose scales may be of any dtype


def parted(text: str | None) -> list[str]:
    """Return the formats that commas part, brackets aside; one where there is no comma."""
    found, depth = [""], 0
    for c in text or "":
        depth += (c == "[") - (c == "]")
        if c == "," and not depth:
            found.append("")
        else:
            found[-1] += c
    return [f.strip() for f in found]


def places(out: Path, texts: list[str]) -> dict[str, Path]:
    """Return where each output lies.

    Raises LlmqError for one that is named twice, for a first without a folder, and for an OUT that is a checkpoint.
    """
    first = named(texts[0], "--format")
    if not isinstance(first, AsFormat):
        raise LlmqError(
            f"--format {','.join(texts)}: the solve is written in the first, which is to be a folder: name gptq, awq, "
            "compressed-tensors, modelopt or mlx there"
        )
    if one_file(out):
        raise LlmqError(f"--format {','.join(texts)} makes a folder of all of them; leave .gguf out of its name")
    if (out / "config.json").exists():
        raise LlmqError(f"{out} is a checkpoint itself; name another folder, in which the outputs will lie")
    found = {text: _place(out, text) for text in texts}
    if len(set(found.values())) < len(texts):
        raise LlmqError(f"--format {','.join(texts)} names one format twice; each has one place in OUT")
    return found


def _place(out: Path, text: str) -> Path:
    name, suffix = registry.words(text)[0], named(text, "--format").suffix
    return out / f"{out.name}{suffix}" if suffix else out / name


def risen(options: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """Return a recipe's options with what all targets hold of scales, see `fitted`; `format` becomes the first."""
    targets = [named(text) for text in texts]
    dtypes = [dtype for t in targets if (dtype := getattr(t, "scales", None))]
    falls = all(getattr(t, "falls", True) for t in targets)
    return fitted({**options, "format": texts[0]}, falls=falls, scales=dtypes[0] if dtypes else None)


def fitted(options: Mapping[str, Any], *, falls: bool, scales: str | None) -> dict[str, Any]:
    """Return a recipe's options with a range whose scales are positive, unless they may fall, and in that dtype.

    scales: the dtype, in which compressed-tensors stores them then; None leaves it to the format. A range that says how
    it searches, weights that are named as a whole and another format stay as the user has them.
    """
    made, range_, form = dict(options), options.get("range") or "mse", options.get("format") or _SCALED
    if not falls and not options.get("weights") and range_.partition(":")[0] == "mse" and "shift" not in range_:
        made["range"] = f"{range_}:shift=false"
    if scales and registry.words(form)[0] == _SCALED and "scales=" not in form:
        made["format"] = f"{form}:scales={scales}"
    return made


def require(out: Path, text: str, *, overwrite: bool) -> None:
    """Raise LlmqError for what an export would refuse after the solve: a missing package, a place that is taken."""
    target = named(text)
    target.require()
    target.sink(out, overwrite=overwrite)


@contextmanager
def told_how_to_go_on(first: Path) -> Iterator[None]:
    """Note, of what ends an export, how the rest is made."""
    try:
        yield
    except BaseException as e:
        e.add_note(f"{first} is whole; the same command goes on with the rest")
        raise


def foresee(plan: Plan, text: str) -> list[str]:
    """Raise LlmqError where a target cannot hold the codes of a planned solve, with the reason; return its warnings."""
    target = named(text)
    if not isinstance(target, OfCodes):
        raise LlmqError(f"--format {text}: it holds no codes; llmq export makes it of what was written")
    linears = SimpleNamespace(linears=plan.linears)
    skipped = [n for n in plan.skipped if n != plan.model.head or not plan.skeleton.config.tie_word_embeddings]
    opened = Packed(plan.source, [], config=plan.skeleton.config, packed=cast(Any, linears), skipped=skipped)
    if getattr(plan.method.format, "desc_act", False) and registry.words(text)[0] not in ("gptq", "gptq_v2"):
        raise LlmqError(f"--format {text} holds no weights in activation order; leave desc_act out")
    for spec in opened.linears:
        grid = spec.scheme.weight
        searched = isinstance(grid, RangedGrid) and grid.falls and getattr(grid.range, "shift", False)
        if searched and not target.falls:
            why = f"{target.runtime} holds no negative scales, as searched ranges have"
            raise LlmqError(f"{spec.name}: {why}: say --range mse:shift=false")
    return target.foresee(opened)
