"""What may be written where: everything about OUT that can be refused before any work.

OUT is new, or the user gives it up by `--overwrite`, and then only if it is what llmq would write there: a quantized
checkpoint, ours or a peer's, or one that `llmq dequantize` made, and nothing beside it. Any other float checkpoint may
be someone's only copy, a folder with other files in it is a project: neither is ever replaced.
Not here: the write itself (sink.py), earlier runs on the same OUT (stage.py), GGUF shards (gguf/container.py).
"""

import os
import shutil
from collections.abc import Container, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, one_line
from llmq.guard.reading import field, json_object

_SPARE = "model-00001-of-00001.safetensors.llmq-partial-2"  # the longest that llmq puts behind OUT in a path
_ADDED = 24  # ... and behind its last name: a stage's suffix, a shard's number
_CHECKPOINT = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja",
    "chat_template.json", "additional_chat_templates", "quantization.json", "quant_log.csv", "recipe.yaml", "README.md",
    "LICENSE*", "NOTICE*", "USE_POLICY.md", ".gitattributes", "dequantization.json", "export.json", "model.onnx",
    "model.onnx.data",
)  # fmt: skip
"""What a quantized checkpoint's folder holds, by this tool or another."""
_ADAPTER = "adapter_*"
"""What peft writes, which fits the patterns above and is someone's training."""
AFTERWARDS = ("report.html", "timings.json", "evaluation.json")
"""What llmq puts into OUT once it is written: no record lists it, no reader of checkpoints takes it (`beside`)."""
_QUANTIZED = ("quantization_config", "quantization", "compression_config")  # keys of config.json
RECORD = "quantization.json"
"""The record of a run, in its OUT (docs/record.md)."""
DEQUANTIZED = "dequantization.json"
"""The record of a float checkpoint that llmq made of a quantized one, which can be made again."""
EXPORTED = "export.json"
"""The record of a folder that `llmq export` made for another runtime."""
_WEIGHTS = (".safetensors", ".onnx")
_RECORDS = (
    RECORD,
    DEQUANTIZED,
    EXPORTED,
    "quantize_config.json",
    "quant_config.json",
)  # beside it, of any tool


def user_path(text: str | Path) -> Path:
    """Return a path as a user wrote it, with `~` expanded. Raises LlmqError for one that no system can hold."""
    try:
        path = Path(text).expanduser()
        os.fsencode(path).decode()
        path.exists()
    except (RuntimeError, ValueError, OSError) as e:
        raise LlmqError(f"{text} is no path ({one_line(e)}); give another name") from e
    if "\0" in str(path):
        raise LlmqError(f"{text} is no path (it holds a NUL); give another name")
    return path


def place(text: str | Path, reads: Mapping[str, Path]) -> Path:
    """Return where OUT lies, absolute. reads: folders and files that are read, by what to call them.

    Raises LlmqError where a thing of that name cannot be made, or would be made out of what is read.
    """
    given = user_path(text)
    if given.name in ("", ".."):
        raise LlmqError(f"OUT {text} names no folder or file to make; give it a name, such as ./my-model-int4")
    try:
        out = given.parent.resolve() / given.name
        out.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError) as e:  # a name too long; a parent that is a file; a loop of links
        raise LlmqError(f"OUT cannot be written ({one_line(e)}): {given}") from e
    if out.is_symlink():
        raise LlmqError(f"{given} is a symbolic link to {out.readlink()}; name that, or remove the link")
    if out.is_mount():
        raise LlmqError(f"{given} is a mount point, which cannot be replaced; name something in it")
    _room(given, out)
    for what, path in reads.items():
        _apart(given, out, what, path)
    return out


def one_file(out: Path) -> bool:
    """Say whether OUT is named as one GGUF file. Raises LlmqError for .GGUF, which tools do not look for."""
    if out.suffix != ".gguf" and out.suffix.lower() == ".gguf":
        raise LlmqError(f"{out} ends in {out.suffix}; call it {out.with_suffix('.gguf')}")
    return out.suffix == ".gguf"


def is_gguf(name: str | Path) -> bool:
    """Say whether what is read is a GGUF file: a file, or named as one; else it is a folder or on the Hub."""
    return str(name).lower().endswith(".gguf") or user_path(name).is_file()


def recorded(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run that made a folder, None where there is none. Raises LlmqError for a broken one."""
    return json_object(folder / RECORD) if (folder / RECORD).is_file() else None


def beside(out: Path, name: str) -> Path:
    """Return where a file of `AFTERWARDS` lies: `OUT/report.html`, and of OUT.gguf `OUT.report.html` beside it."""
    return out.with_name(f"{out.stem}.{name}") if out.suffix == ".gguf" else out / name


def check_folder(out: Path, copied: Container[str], *, overwrite: bool) -> None:
    """Raise LlmqError unless OUT can become a folder: it is not there, or is a checkpoint that may be replaced.

    copied: names of files that are handed on from what OUT is made of.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise LlmqError(f"{out} is a file; name a folder to write")
    if not overwrite:
        raise LlmqError(f"{out} exists; give another folder or --overwrite")
    try:
        names = sorted(p.name for p in out.iterdir())
    except OSError as e:
        raise LlmqError(f"cannot read {out} ({one_line(e)})") from e
    if names and not _quantized(out, names):
        raise LlmqError(
            f"{out} is not a quantized checkpoint folder; it is not overwritten. Remove it, or name another"
        )
    listed = _listed(out, names)
    for name in names:
        inner = out / name
        known = _belongs(name, listed) or (name in copied and not fnmatch(name, _ADAPTER))
        if inner.is_dir() and not inner.is_symlink():
            known = name == "additional_chat_templates" and all(f.suffix == ".jinja" for f in inner.iterdir())
        if not known:
            raise LlmqError(
                f"{out} holds {name}, which is no part of a checkpoint; it is not overwritten. Move {name} out"
            )


def _belongs(name: str, listed: Container[str]) -> bool:
    """Say whether a file is part of a checkpoint: one that its record lists, or of a name that no other file has."""
    if name in listed or name in AFTERWARDS:
        return True
    known = any(fnmatch(name, p) for p in _CHECKPOINT) and not fnmatch(name, _ADAPTER)
    return known and not (listed and name.endswith(_WEIGHTS))  # weights beside those that the record lists


def _listed(out: Path, names: list[str]) -> set[str]:
    """Return the files that the records in a folder list, none where nothing does."""
    found: set[str] = set()
    for name in (RECORD, DEQUANTIZED, EXPORTED):
        with suppress(LlmqError):  # a broken record lists nothing
            found |= set(field(json_object(out / name), "files", dict, name, {})) if name in names else set()
    return found


def check_file(path: Path, option: str, start: bytes, *, overwrite: bool) -> None:
    """Raise LlmqError unless the file that an option names can be written, or replaced where that is asked for.

    start: how a file that may be replaced begins.
    """
    if any(fnmatch(path.name, p) for p in _CHECKPOINT):
        raise LlmqError(f"{option} {path} is called like a file of a checkpoint; give another name")
    try:
        if path.is_dir() or not path.name:
            raise LlmqError(f"{option} {path} is a folder; name a file in it")
        if path.is_symlink() and path.is_file():
            raise LlmqError(f"{option} {path} is a symbolic link to {path.readlink()}; name that")
        if path.is_file() and not overwrite:
            raise LlmqError(f"{option} {path} exists; give another name or --overwrite")
        if path.is_file() and not start.startswith(_beginning(path, len(start))):
            raise LlmqError(f"{option} {path} holds something else; it is not overwritten. Give another name")
        if not path.parent.is_dir():
            raise LlmqError(f"{option} {path}: {path.parent} is no folder that exists; make it, or name another")
        path.lstat()
    except FileNotFoundError:
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise LlmqError(f"{option} {path}: {path.parent} cannot be written to; name another folder") from None
    except OSError as e:
        raise LlmqError(f"{option} {path} cannot be written ({one_line(e)})") from e


def _beginning(path: Path, n: int) -> bytes:
    with path.open("rb") as f:
        return f.read(n)


def _quantized(out: Path, names: list[str]) -> bool:
    """Say whether a folder holds a quantized checkpoint, by what its config says and what lies there."""
    if ".git" in names or "config.json" not in names or not any(n.endswith(_WEIGHTS) for n in names):
        return False
    try:
        config: dict[str, Any] = json_object(out / "config.json")
    except LlmqError:
        return False
    is_model = "model_type" in config or "architectures" in config
    return is_model and (any(config.get(k) for k in _QUANTIZED) or any(r in names for r in _RECORDS))


def _room(given: Path, out: Path) -> None:
    """Raise LlmqError where the stage of OUT could not be made beside it."""
    above = next(p for p in out.parents if p.exists())
    if not above.is_dir():
        raise LlmqError(f"{given} cannot be written: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise LlmqError(f"{given} cannot be written: {above} is not yours to write to; name a place that is")
    longest = os.pathconf(above, "PC_NAME_MAX")
    if any(len(os.fsencode(p.name)) > longest - (_ADDED if p == out else 0) for p in (out, *out.parents)):
        raise LlmqError(f"OUT cannot be written (a name has at most {longest - _ADDED} bytes here): {given}")
    if len(os.fsencode(out)) + _ADDED + len(_SPARE) > os.pathconf(above, "PC_PATH_MAX"):
        raise LlmqError(f"OUT cannot be written (the path is too long): {given}")


def _apart(given: Path, out: Path, what: str, path: Path) -> None:
    """Raise LlmqError where writing OUT would touch something that is read."""
    try:
        read = path.resolve()
        links = {f.name: f.resolve() for f in path.iterdir()} if path.is_dir() else {}
        same = out.exists() and path.exists() and out.samefile(path)
    except OSError as e:
        raise LlmqError(f"cannot read {path} ({one_line(e)})") from e
    if same or out == read:
        raise LlmqError(f"OUT {given} is {what} itself, which is never overwritten; name another")
    if read.is_relative_to(out):
        raise LlmqError(f"OUT {given} holds {what}, {path}; name another place")
    if out.is_relative_to(read):
        raise LlmqError(f"OUT {given} lies in {what}, {path}; name a place outside")
    for name, file in links.items():
        if file.is_relative_to(out):
            raise LlmqError(f"OUT {given} holds {name}, to which {what} links; name another place")


def require(out: Path, need: int) -> None:
    """Raise LlmqError where the disk that OUT will lie on has less than `need` bytes free."""
    free = shutil.disk_usage(standing(out)).free
    if free < need:
        raise LlmqError(f"{out} needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; make room")


def standing(out: Path) -> Path:
    """Return the nearest folder around OUT that is there."""
    return next(p for p in out.absolute().parents if p.is_dir())
