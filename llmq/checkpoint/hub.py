"""Which folder a name means, and what a folder is called.

    DIR                 a local folder, whatever characters its name has
    org/name            a repository of the Hub, its default branch
    org/name@REVISION   the same at a branch, a tag or a commit

The Hub's cache keeps each commit in `models--org--name/snapshots/COMMIT`: a folder there, however it is reached, is
called org/name, and its commit is known.
Not here: what is in the folder (source.py), adapters (model/adapter.py).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, one_line, printable

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
"""What a checkpoint holds beside its weights."""
_FETCHED = [*COPIED, "*.safetensors", "README.md"]  # the model card, for its licence
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+)", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: org/name and a commit of the Hub, or the name of a folder.

    adapter: what was added to its weights, as it is recorded: an origin too, and its hash.
    """

    name: str
    commit: str | None = None
    adapter: dict[str, Any] | None = None


def resolve(name: str) -> Path:
    """Return the local folder of a checkpoint or an adapter: `name` itself, or a download of that Hub id.

    Downloads configuration, tokenizer, model card and safetensors only. Raises LlmqError where there is neither.
    """
    path = _local(name) if name else None  # Path("") is the folder one stands in
    if path is not None:
        return path
    repository, at, revision = name.partition("@")
    if not _REPOSITORY.fullmatch(repository) or name.startswith("."):
        raise LlmqError(f"{name or repr(name)} is not a folder; give a checkpoint folder or a Hub id such as org/name")
    if at and not revision:
        raise LlmqError(f"{name} names no revision; write {repository}, or {repository}@REVISION")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise LlmqError(f"{name} is not a local folder and the Hub did not deliver it ({one_line(e)})") from e


def origin(folder: Path) -> Origin:
    """Return what a folder is called: the repository and the commit for one in the Hub's cache, else its own name."""
    real = folder.resolve()
    for place in (real, *real.parents):
        cached = _CACHED.fullmatch(place.parent.parent.name)
        if cached and place.parent.name == "snapshots":
            return Origin(cached[1].replace("--", "/"), place.name)
    return Origin(printable(Path(os.path.abspath(folder)).name) or "model")  # noqa: PTH100  (absolute() keeps `..`)


def called(name: str) -> str:
    """Return what a checkpoint is called to others: org/name, or the name of a folder or file without where it lies."""
    path = Path(name).expanduser()
    return origin(path).name if path.exists() else name


def is_repository(name: object) -> bool:
    """Say whether a text has the form org/name of a Hub repository."""
    return isinstance(name, str) and bool(_REPOSITORY.fullmatch(name)) and not name.startswith(".")


def _local(name: str) -> Path | None:
    """Return a folder of that name, None where nothing has it. Raises LlmqError for a file, or no possible name."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        there = path.exists()
    except (OSError, RuntimeError) as e:  # too long, not permitted; a ~user that does not exist
        raise LlmqError(
            f"cannot open {printable(name, 200)} ({one_line(e)}); give a checkpoint folder or a Hub id"
        ) from e
    if there and path.suffix == ".gguf":
        raise LlmqError(f"{name} is a GGUF file: llama.cpp runs it, llmq inspect shows it; give a checkpoint folder")
    if there:
        raise LlmqError(f"{name} is a file; give the folder that holds config.json and the .safetensors files")
    return None
