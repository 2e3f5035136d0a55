"""A checkpoint read: which file and which tensor counts, answered one tensor at a time.

Not here: which folder a name means (hub.py), what the tensors mean (stream, formats), reading a header (reading.py),
writing (sink.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.hub import origin
from llmq.errors import LlmqError
from llmq.reading import DTYPES, Entry, json_object, tensor_entries

ADAPTER = "adapter_config.json"
"""What a folder holds that peft has written an adapter to."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json. Raises LlmqError where it is missing, broken, or asks for the checkpoint's own code."""
    file = path / "config.json"
    if not file.is_file():
        raise LlmqError(f"{path} has no config.json; a transformers checkpoint folder is needed")
    config = json_object(file)
    if "auto_map" in config:
        raise LlmqError(f"{path} needs code from the checkpoint (auto_map in config.json); llmq never runs such code")
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
    """A checkpoint's tensors by name.

    adapter: the folder of one that is going to be added, and may therefore lie beside the weights.
    warnings: what a user should know of the source.
    Raises LlmqError for a missing, truncated or pickle-only file, each by name, and for an adapter not asked for.
    """

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self.path = path
        self.origin = origin(path)
        self.adapter = adapter
        self.warnings: list[str] = []
        if adapter is None or adapter.resolve() != path.resolve():
            refuse_adapter(path)
        self.config = read_config(path)
        self._entries: dict[str, Entry] = {}
        for file in self._files():
            self._entries |= sorted(tensor_entries(path / file).items())

    def _files(self) -> list[str]:
        """Return the weight files that transformers takes: a single file before an index."""
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if index.is_file():
            named = json_object(index).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
                raise LlmqError(f"{index} has no weight_map from tensors to files; download it again")
            files = sorted(set(named.values()))
        else:
            files = sorted(f.name for f in self.path.glob("*.safetensors"))
        if not files and (list(self.path.glob("*.bin")) or list(self.path.glob("*.pt*"))):
            raise LlmqError(
                f"{self.path} holds pickle files only (.bin, .pt), which can run code when read; convert them where "
                "you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        if not files:
            raise LlmqError(f"{self.path} holds no .safetensors file")
        for file in files:
            if not (self.path / file).is_file():
                raise LlmqError(f"shard {file} is missing from {self.path}; download it again")
        return files

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

    @property
    def dtype(self) -> torch.dtype:
        """What the checkpoint is stored in: the dtype of its first tensor."""
        return DTYPES.get(next(iter(self._entries.values())).dtype, torch.float32)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return what one tensor is stored in."""
        return DTYPES[self._entries[name].dtype]

    def headers(self) -> dict[str, tuple[str, list[int]]]:
        """Return the dtype (in safetensors' spelling) and shape of every tensor, without reading any."""
        return {name: (e.dtype, list(e.shape)) for name, e in self._entries.items()}

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor."""
        return {name: e.nbytes for name, e in self._entries.items()}

    def bytes(self) -> int:
        """Return the size of all weight files."""
        return sum(file.stat().st_size for file in {e.file for e in self._entries.values()})

    def check(self) -> None:
        """Read every tensor once. Raises LlmqError naming the first that is not float or not finite."""
        for name in self._entries:
            tensor = self.get(name)
            if tensor.dtype not in _FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise LlmqError(f"tensor {name} is {kind}; llmq quantizes float32, bfloat16 and float16 checkpoints")
            if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():  # NaN is a minimum
                raise LlmqError(f"tensor {name} holds NaN or Inf; the checkpoint is damaged, or its training diverged")


class View(Source):
    """A settled source seen through a change: what `get` returns is made of the base's tensors (rotation, adapters)."""

    def __init__(self, base: Source) -> None:
        self.base, self.path, self.origin, self.config = base, base.path, base.origin, dict(base.config)
        self.adapter, self.warnings = base.adapter, list(base.warnings)
        self._entries = dict(base._entries)

    def get(self, name: str) -> Tensor:
        """Return one tensor of the base."""
        return self.base.get(name)
