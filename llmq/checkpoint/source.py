"""A checkpoint read: which file counts, answered one tensor at a time.

As transformers has it: the file that config.json names (`transformers_weights`), else model.safetensors, else those of
model.safetensors.index.json, whose later files win. Nothing outside the folder is read, wherever a link or an index
points, but for a Hub cache's own links:

    models--org--name/snapshots/COMMIT/config.json -> ../../blobs/SHA

Not here: which folder a name means (hub.py), which tensor is which (names.py), what tensors mean (model/, formats/),
reading a header (guard/reading.py), writing (sink.py).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.dialects import quantization, without_quantization
from llmq.checkpoint.hub import COPIED, origin
from llmq.checkpoint.parts import Place, part_of, rejoined
from llmq.checkpoint.place import EXPORTED
from llmq.errors import LlmqError, one_line
from llmq.guard.reading import DTYPES, Entry, field, is_file, json_object, tensor_entries

ADAPTER = "adapter_config.json"
"""What a folder holds that peft has written an adapter to."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refuse_links(folder: Path) -> None:
    """Raise LlmqError for an entry of a checkpoint folder that leads out of it, or is neither file nor folder."""
    try:
        for place in {folder, *((folder / p).parent for p in COPIED)}:
            for entry in sorted(place.iterdir()) if place.is_dir() else ():
                if entry.is_symlink() and not _inside(folder, entry):
                    raise LlmqError(
                        f"{entry} is a link to {entry.readlink()}, outside the checkpoint; copy the file, or remove it"
                    )
                if not entry.is_file() and not entry.is_dir():
                    raise LlmqError(f"{entry} is neither a file nor a folder; remove it from the checkpoint")
    except OSError as e:
        raise LlmqError(f"cannot read {folder} ({one_line(e)})") from e


def _inside(folder: Path, path: Path) -> bool:
    """Say whether a path ends in the folder, or in the blobs beside the snapshots where it is one of a Hub cache."""
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a zero byte
        return False
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else None
    return target.is_relative_to(home) or target.parent == blobs


def side_files(folder: Path) -> list[Path]:
    """Return the files beside the weights: configs, tokenizer, chat templates, generation settings."""
    refuse_links(folder)
    return sorted(f for pattern in COPIED for f in folder.glob(pattern) if f.is_file())


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json, without a `quantization_config` of null, which a float checkpoint may have.

    Raises LlmqError where it is missing, broken, or asks for the checkpoint's own code.
    """
    file = path / "config.json"
    if not file.is_file():
        raise LlmqError(f"{path} has no config.json; a transformers checkpoint folder is needed")
    config = json_object(file)
    if "auto_map" in config:
        raise LlmqError(f"{path} needs code from the checkpoint (auto_map in config.json); llmq never runs such code")
    if config.get("quantization_config", ...) is None:
        del config["quantization_config"]
    field(config, "quantization_config", dict, str(file), {})
    return config


def refuse_adapter(path: Path) -> None:
    """Raise LlmqError for a folder with an adapter, which transformers adds or leaves out as it finds peft or not."""
    if not (path / ADAPTER).is_file():
        return
    if (path / "config.json").is_file():
        raise LlmqError(
            f"{path} holds an adapter ({ADAPTER}) beside its weights; add it with --adapter {path}, or remove it"
        )
    raise LlmqError(
        f"{path} is an adapter, not a model; quantize the model that it was trained on with --adapter {path}"
    )


class Source:
    """A checkpoint's tensors by name: as stored, until names.settle gives them the model's.

    adapter: the folder of one that is going to be added, and may therefore lie beside the weights.
    warnings: what a user should know of the source. unread: names of tensors that no model reads. decoded: what was
    packed and is decoded as it is read (decoding.py), None of a checkpoint of floats.
    Raises LlmqError for a missing, truncated or pickle-only file, each by name, and for an adapter not asked for.
    """

    decoded: dict[str, Any] | None = None

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self.path = path
        self.origin = origin(path)
        self.adapter = adapter
        self.warnings: list[str] = []
        if path.is_dir():
            refuse_links(path)
        if adapter is None or adapter.resolve() != path.resolve():
            refuse_adapter(path)
        self.config = read_config(path)
        self.unread: frozenset[str] = frozenset()
        self._entries: dict[str, Entry] = {}
        self._written: dict[str, str] = {}
        for file in self._files():
            self._entries |= sorted(tensor_entries(path / file).items())

    def _files(self) -> list[str]:
        """Return the weight files that transformers takes."""
        said = field(self.config, "transformers_weights", str, f"{self.path}/config.json", "")
        names = [said] if said else ["model.safetensors", "model.safetensors.index.json"]
        first = next((n for n in names if _inside(self.path, self.path / n) and is_file(self.path / n)), None)
        if first is None:
            raise LlmqError(self._no_weights())
        if not first.endswith(".index.json"):
            return [first]
        files = _named_by(self.path / first)
        for file in files:
            if not _inside(self.path, self.path / file):
                raise LlmqError(f"{self.path / first} names {file}, which lies outside the checkpoint; correct it")
            if not is_file(self.path / file):
                raise LlmqError(f"shard {file} is missing from {self.path}; download it again")
        return files

    def _no_weights(self) -> str:
        found = sorted(f.name for f in self.path.glob("*.safetensors"))
        if found:
            return (
                f"{self.path} holds {found[0]}, but no model.safetensors or model.safetensors.index.json, by which "
                "transformers finds weights; rename a single file, or download the index"
            )
        if list(self.path.glob("*.bin")) or list(self.path.glob("*.pt*")):
            return (
                f"{self.path} holds pickle files only (.bin, .pt), which can run code when read; convert them where "
                "you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        if (self.path / EXPORTED).is_file():
            return (
                f"{self.path} is a model for another runtime that llmq export made: it was checked when it was written "
                "and is not read by llmq again; give the checkpoint that it was made of"
            )
        return f"{self.path} holds no .safetensors file"

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What the checkpoint says of packed weights, wherever its writer put it; None of a float one."""
        return quantization(self.path, self.config, self._entries)

    def become(self, entries: Mapping[str, Entry], decoded: Mapping[str, Any]) -> None:
        """Hold other tensors, decoded as they are read, and a config that says nothing of packed ones."""
        self._entries, self.decoded = dict(entries), dict(decoded)
        self.config = without_quantization(self.config)

    def rename(self, names: Mapping[str, str], written: Mapping[str, str], unread: Iterable[str]) -> None:
        """Give the tensors other names, new -> old; those not named are left out. written: new -> as OUT has them."""
        self._entries = {new: self._entries[old] for new, old in names.items()}
        as_is = {n.rpartition(".")[0] for n in names if written.get(n, n) == n}
        # a module goes by another name only where all its tensors do
        modules = {n: w for n, w in _modules(written).items() if n in written or n not in as_is}
        self._written = modules | self._written
        self.unread = frozenset(unread)

    def split(self, parts: Mapping[str, Place]) -> None:
        """Make parts of tensors that several names were given to, by where they lie."""
        for name, place in parts.items():
            self._entries[name] = part_of(self._entries[name], place)

    def joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model, the float ones that `split` made put together again; see `rejoined`."""
        return rejoined(self._entries, tensors)

    def drop(self, name: str) -> None:
        """Leave a tensor out."""
        del self._entries[name]

    def written(self, name: str) -> str:
        """Return the name under which runtimes look for a module, or for a tensor of one, packed or not."""
        parent, dot, leaf = name.rpartition(".")
        return self._written.get(name) or f"{self._written.get(parent, parent)}{dot}{leaf}"

    def names(self) -> list[str]:
        """Return all tensor names."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype. Raises LlmqError where the checkpoint does not have it."""
        if name not in self._entries:
            raise LlmqError(f"tensor {name} is missing from {self.path}; the checkpoint does not match its config.json")
        return self._entries[name].read()

    def get_slice(self, name: str, i: int) -> Tensor:
        """Return what the first dimension of a tensor has at `i`, without reading or decoding the rest."""
        if name not in self._entries:
            return self.get(name)  # raises
        return self._entries[name].read_slice(i)

    @property
    def dtype(self) -> torch.dtype:
        """What the checkpoint is stored in: the dtype of its first float tensor."""
        floats = (d for e in self._entries.values() if (d := DTYPES.get(e.dtype)) and d.is_floating_point)
        return next(floats, torch.float32)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return what one tensor is stored in."""
        return DTYPES[self._entries[name].dtype]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._entries[name].shape

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype (in safetensors' spelling) and shape of every tensor, without reading any."""
        return {name: (e.dtype, e.shape) for name, e in self._entries.items()}

    def entries(self) -> dict[str, Entry]:
        """Return where every tensor lies, and under which name there."""
        return dict(self._entries)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor."""
        return {name: e.nbytes for name, e in self._entries.items()}

    def bytes(self) -> int:
        """Return the size of all weight files; of decoded ones, the size that they would have."""
        if self.decoded:
            return sum(self.sizes().values())
        return sum(file.stat().st_size for file in {e.file for e in self._entries.values()})

    def check(self, see: Callable[[str, Tensor], None] | None = None) -> None:
        """Read every tensor of the model once and show it to `see`.

        Raises LlmqError naming the first that is not float or not finite.
        """
        for name in [n for n in self._entries if n not in self.unread]:
            tensor = self.get(name)
            if tensor.dtype not in _FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise LlmqError(f"tensor {name} is {kind}; llmq quantizes float32, bfloat16 and float16 checkpoints")
            if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():  # NaN is a minimum
                raise LlmqError(f"tensor {name} holds NaN or Inf; the checkpoint is damaged, or its training diverged")
            if see is not None:
                see(name, tensor)


class View(Source):
    """A settled source seen through a change: what `get` returns is made of the base's tensors (rotation, adapters)."""

    def __init__(self, base: Source) -> None:
        self.base, self.path, self.origin, self.config = base, base.path, base.origin, dict(base.config)
        self.adapter, self.warnings, self.unread = base.adapter, list(base.warnings), base.unread
        self.decoded = base.decoded
        self._entries, self._written = dict(base._entries), dict(base._written)

    def get(self, name: str) -> Tensor:
        """Return one tensor of the base."""
        return self.base.get(name)

    def get_slice(self, name: str, i: int) -> Tensor:
        """Return what the first dimension of a tensor of this view has at `i`."""
        return self.get(name)[i]


def _modules(names: Mapping[str, str]) -> dict[str, str]:
    """Return other names of tensors and of the modules around them, as far as these end alike."""
    found: dict[str, str] = {}
    for tensor, stored in names.items():
        new, old, leaf, same = tensor, stored, "", ""
        while new and new != old and new not in found and leaf == same:
            found[new] = old
            new, _, leaf = new.rpartition(".")
            old, _, same = old.rpartition(".")
    return found


def _named_by(index: Path) -> list[str]:
    """Return the files that an index names. Raises LlmqError for one that transformers does not read either."""
    said = json_object(index)
    named = field(said, "weight_map", dict, str(index))
    field(said, "metadata", dict, str(index))
    if not named or not all(isinstance(f, str) for f in named.values()):
        raise LlmqError(f"{index} has no weight_map from tensors to files; download it again")
    return sorted(set(named.values()))
