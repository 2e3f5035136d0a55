"""What the Hub reads of a model card: the YAML before its text, which files a model under base, licence and language.

    ---
    base_model: org/name
    base_model_relation: quantized
    library_name: transformers
    pipeline_tag: text-generation
    license: apache-2.0
    language: [en, de]
    tags: [gptq, 4-bit, llmq, conversational]
    ---

Base and relation are what the run knows; licence, language, task and tags are the source's, read from its README.md. A
stranger wrote that file: of each key only what has the form that the Hub gives it is taken over.
Source: huggingface.co/docs/hub/model-cards and repositories-licenses; `ModelCardData` of huggingface_hub.
Not here: the text of the card (card.py), what a source is called (hub.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmq.checkpoint.hub import is_repository, origin
from llmq.errors import LlmqError
from llmq.guard.reading import front_matter
from llmq.readers import Reader

CARD = "README.md"
"""The model card of a checkpoint folder."""
_LICENCE = re.compile(r"[\w.+-]{1,60}", re.ASCII)
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_TAG = re.compile(r"[\w.+/ -]{1,60}")
_BITS = re.compile(r"\d+(\.\d+)?-bit")
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LINK = re.compile(r"https://[!-;=?-~]{1,500}")  # what is visible, without < and >
_FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_HUB = "https://huggingface.co/"
_GGUF_LICENCE = {
    "license": "general.license", "license_name": "general.license.name", "license_link": "general.license.link",
}  # fmt: skip
_GGUF_BASE = "general.base_model.0.repo_url"
_MOST = 100  # languages, tags
_LIBRARIES = {"transformers": "transformers", "MLX": "mlx", "ExecuTorch": "executorch"}
"""The Hub's name of the library that loads a model, by the runtime that takes it; the first that does is said."""
_NOT_ALIKE = {"safetensors", "pytorch", "tf", "jax", "onnx", "gguf", "ggml", "mlx", "endpoints_compatible"}
"""Tags that say how the source is stored."""


@dataclass(frozen=True)
class SourceCard:
    """What the card of a source says that holds for what is made of it, too.

    licence: `license` and, where it is none that the Hub knows by name, `license_name` and `license_link`.
    base: the repository that the source itself was made from.
    """

    licence: Mapping[str, str]
    languages: Sequence[str] = ()
    tags: Sequence[str] = ()
    task: str | None = None
    base: str | None = None

    def unlike(self, method: str) -> SourceCard:
        """Return it without the tags of a format that the source is in and what is made of it is not."""
        return replace(self, tags=[t for t in self.tags if t != method and not _BITS.fullmatch(t)])


NO_CARD = SourceCard({})
"""That of a source without one."""


def source_card(folder: Path) -> tuple[SourceCard, list[str]]:
    """Return what the README.md of a source says, and a warning where it cannot be read."""
    file = folder / CARD
    if not file.is_file():
        return NO_CARD, []
    try:
        said = front_matter(file)
    except LlmqError as e:
        return NO_CARD, [f"{e}: the model card takes no licence, languages and tags over from it"]
    return _card(said, origin(folder).name), []


def _card(said: Mapping[str, Any], name: str) -> SourceCard:
    """Return what of a front matter has the form that the Hub gives it. name: of the source."""
    return SourceCard(
        _licence(said, name),
        [n for n in _texts(said.get("language"), no="no") if _LANGUAGE.fullmatch(n)],
        [t for t in _texts(said.get("tags")) if _TAG.fullmatch(t) and t not in _NOT_ALIKE],
        next((t for t in _texts(said.get("pipeline_tag")) if _TASK.fullmatch(t)), None),
        next((b for b in _texts(said.get("base_model")) if is_repository(b)), None),
    )


def gguf_keys(card: SourceCard, base: str | None) -> dict[str, str | int | list[str]]:
    """Return the keys by which a GGUF file says what a card does, as llama.cpp's converter names them.

    base: the repository that the file is made from. Source: the GGUF specification, general metadata.
    """
    found: dict[str, str | int | list[str]] = {_GGUF_LICENCE[key]: value for key, value in card.licence.items()}
    lists = {"general.languages": [*card.languages], "general.tags": [*card.tags]}
    found |= {key: several for key, several in lists.items() if several}
    return found | ({"general.base_model.count": 1, _GGUF_BASE: f"{_HUB}{base}"} if base else {})


def of_gguf(value: Callable[[str], Any]) -> tuple[SourceCard, str | None]:
    """Return what the keys of a GGUF file say, by `value` of a key; and the repository that it was made from."""
    said = {key: value(name) for key, name in _GGUF_LICENCE.items()}
    card = _card(said | {"language": value("general.languages"), "tags": value("general.tags")}, "")
    base = str(value(_GGUF_BASE) or "").removeprefix(_HUB)
    return card, base if is_repository(base) else None


def task_of(config: Mapping[str, Any]) -> str:
    """Return the Hub's name of what a model does, by its config.json: one that reads images too says so."""
    named = config.get("architectures")
    whole = isinstance(named, list) and any(str(n).endswith("ForConditionalGeneration") for n in named)
    return "image-text-to-text" if whole and "vision_config" in config else "text-generation"


def library(readers: Iterable[Reader]) -> str | None:
    """Return the library that the Hub shows how to load a model with, None where it has none of those that take it."""
    taken = {r.runtime for r in readers if r.accepts}
    return next((name for runtime, name in _LIBRARIES.items() if runtime in taken), None)


def metadata(
    base: str | None, relation: str | None, library: str | None, task: str, tags: Sequence[str], card: SourceCard
) -> dict[str, Any]:
    """Return the keys of the front matter, in the order that the Hub's own cards have them.

    base: the repository that the model was made from, None where none is known; relation: how. tags: our own.
    """
    found = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": library,
        "pipeline_tag": card.task or task,
        **card.licence,
        "language": list(card.languages),
        "tags": list(dict.fromkeys([*tags, *card.tags])),
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


def base_model(name: str, said: object = None) -> str | None:
    """Return the repository that the Hub should link to: the source, or what its config says that it is called."""
    return next((n for n in (name, said) if isinstance(n, str) and is_repository(n)), None)


def _licence(said: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the keys of a licence, a link to a file of the source's repository (name) as one from anywhere."""
    licence = next((t for t in _texts(said.get("license")) if _LICENCE.fullmatch(t)), None)
    if licence is None:
        return {}
    called = next((t for t in _texts(said.get("license_name")) if _LICENCE.fullmatch(t)), None)
    link = next(iter(_texts(said.get("license_link"))), "")
    if is_repository(name) and _FILE.fullmatch(link):
        link = f"{_HUB}{name}/blob/main/{link}"
    found = {"license": licence, "license_name": called, "license_link": link if _LINK.fullmatch(link) else None}
    return {key: value for key, value in found.items() if value}


def _texts(value: Any, no: str | None = None) -> list[str]:
    """Return a text, or the texts of a list, as cards have either.

    no: what false stands for: YAML reads the code of Norwegian, `no`, as that.
    """
    several = value if isinstance(value, list) else [value]
    return [text for v in several[:_MOST] if isinstance(text := no if v is False else v, str)]
