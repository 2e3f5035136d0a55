"""What is compared, by short words: each becomes the options of `quantize` that it stands for.

    w4a16, nvfp4, w8a8 ...       a scheme (schemes.py)
    q4_k_m, q8_0 ...             a type or mixture of ggml
    gptq, mlx ...                a format; compressed-tensors is compressed_tensors too
    awq                          the method and its format: --method awq,gptq --range mse --asym --format awq
    rtn, smoothquant             methods as people name them
    fast, balanced, best         a quality

Options that all candidates share (`--calib`, `--group-size`) go to those for which they mean something.
Not here: what an option means (recipe.py), `NAME=options` of the command line (commands/compare.py).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmq import registry
from llmq.comparing.results import FILE, TOKENS
from llmq.errors import LlmqError, printable
from llmq.gguf import mixture
from llmq.qualities import QUALITIES
from llmq.recipe import Recipe
from llmq.schemes import SCHEMES

Options = dict[str, Any]

SHORT: Mapping[str, Options] = {
    "awq": {"method": "awq,gptq", "range": "mse", "sym": False, "format": "awq"},
    "rtn": {"method": "rtn"},
    "smoothquant": {"method": "smoothquant,gptq", "bits": 8, "act_bits": 8},
}
"""Words that stand for more than their format alone."""


_NAME = re.compile(r"\w[\w .+-]{0,99}(?<!\.gguf)(?<! )")  # what becomes the name of a folder, or with .gguf of a file
_TAKEN = (FILE, TOKENS)


def candidates(words: Iterable[str], named: Mapping[str, Options], shared: Options) -> dict[str, Options]:
    """Return the options of each candidate by its name.

    words: as above. named: options that have a name of the user's. shared: options of all.
    Raises LlmqError for a word that stands for nothing, for a name that no folder should have or that comes twice, and
    for fewer than one.
    """
    found: dict[str, Options] = {}
    for name, options in [*((w.strip().lower(), None) for w in words if w.strip()), *named.items()]:
        if options is not None and (not _NAME.fullmatch(name) or name in _TAKEN):
            raise LlmqError(
                f"--schemes {printable(name, 80)!r} is no plain name: letters, digits, spaces and . _ + - , none of "
                f"{', '.join(_TAKEN)}, as 'mine=--bits 3'"
            )
        if name in found:
            raise LlmqError(f"--schemes names {printable(name, 80)} twice; give each once, or another name")
        own = of_word(name) if options is None else options
        found[name] = with_shared(own, shared)
    if not found:
        raise LlmqError("--schemes names nothing to compare; say for example w4a16,awq,q4_k_m,w8a8")
    return found


def of_word(word: str) -> Options:
    """Return what a word stands for. Raises LlmqError, with what there is, for another."""
    if word in SCHEMES:
        return {"scheme": word}
    if word in SHORT:
        return dict(SHORT[word])
    if word in QUALITIES:
        return {"quality": word}
    if word.replace("-", "_") in registry.names("formats") and word != "gguf":
        return {"format": word.replace("_", "-")}
    try:
        return {"format": "gguf", "type": mixture.mixture(word)}
    except LlmqError as e:
        formats = [n for n in registry.names("formats") if n not in ("gguf", *SHORT)]
        known = ", ".join([*SCHEMES, *SHORT, *QUALITIES, *formats])
        raise LlmqError(
            f"--schemes {printable(word, 80)} is no scheme, format, quality or type of ggml (there are: {known}, "
            "q4_k_m, q8_0 ...; or 'NAME=options of quantize')"
        ) from e


def with_shared(own: Options, shared: Options) -> Options:
    """Return a candidate's options with those of all for which it has no value, and which mean something to it."""
    recipe, found = Recipe.load(None, own), dict(own)
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    for name, value in shared.items():
        of_weights = name == "group_size" and (recipe.quantizes_inputs or recipe.weights)
        if value is None or name in own or (name == "quality" and recipe.method) or of_weights:
            continue
        if name not in fields or all(when.true(recipe) for when in fields[name].metadata.get("when", ())):
            found[name] = value
    return found
