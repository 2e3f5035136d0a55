"""A LoRA adapter in peft's files, added to a checkpoint's weights as they are read.

    W + s B A,   A [r, K], B [N, r],   s = alpha / r, or alpha / sqrt(r) with use_rslora
    E + s (B A)^T,   A [r, V], B [H, r]   for an embedding E [V, H]

    adapter_config.json        peft_type, r, lora_alpha, rank_pattern, alpha_pattern, use_rslora ...
    adapter_model.safetensors  base_model.model.MODULE.lora_A.weight, .lora_B.weight, .lora_B.bias,
                               .lora_embedding_A, .lora_embedding_B; what was trained whole: .weight, .bias

The sum is made in float32 and rounded to the stored dtype (of an embedding, the product is rounded before it is added):
bit for bit what `merge_and_unload` of peft 0.21 makes on a CPU.
Hu et al. 2021, arXiv:2106.09685, section 4.1; rslora: Kalajdzievski 2023, arXiv:2312.03732, equation 9.

What is no plain sum (DoRA, other kinds of adapters) is refused, and so is an adapter of another model.
Not here: finding the folder (checkpoint/hub.py).
"""

import dataclasses
import filecmp
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import regex
from torch import Tensor

from llmq.checkpoint.hub import is_repository, origin
from llmq.checkpoint.source import ADAPTER, View, refuse_links
from llmq.errors import LlmqError, one_line, printable
from llmq.guard.reading import Entry, field, json_object, tensor_entries
from llmq.model.skeleton import Skeleton

_ROLES = {
    "lora_A.weight": ("weight", "A"),
    "lora_B.weight": ("weight", "B"),
    "lora_embedding_A": ("weight", "embedding_A"),
    "lora_embedding_B": ("weight", "embedding_B"),
    "lora_B.bias": ("bias", "shift"),
    "base_layer.weight": ("weight", "whole"),
    "base_layer.bias": ("bias", "whole"),
    "weight": ("weight", "whole"),
    "bias": ("bias", "whole"),
}
"""How the name of an adapter's tensor ends: the tensor of the module that it changes, and its part in that."""
_OTHER_SUMS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights as well
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_MERGE = "merge it into its base with peft (merge_and_unload) and quantize that"
_LARGEST = 1e30  # of alpha: float32 goes to 3e38
_SECONDS = 1.0  # for one pattern on one name; a hostile one can take years


class Adapter:
    """The files of a LoRA adapter: what it does to each tensor of its base, and how it is recorded.

    Raises LlmqError where they are missing or broken, and for what is no plain sum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self._where = folder, folder / "adapter_model.safetensors", f"{folder}/{ADAPTER}"
        for file in (folder / ADAPTER, self.file):
            if not file.is_file():
                raise LlmqError(f"{folder} has no {file.name}; --adapter takes what peft saves, as safetensors")
        refuse_links(folder)
        self.said = json_object(folder / ADAPTER)
        self._refuse_other_kinds()
        self.parts = self._read()

    def record(self) -> dict[str, str | None]:
        """Return what identifies the adapter: its name, its commit on the Hub, the hash of its weights."""
        of = origin(self.folder)
        with self.file.open("rb") as f:
            return {"name": of.name, "commit": of.commit, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}

    def added(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the base with the adapter's part added, in the dtype that it has."""
        part = {role: entry.read() for role, entry in self.parts.get(name, {}).items()}
        out = part["whole"].to(tensor.dtype) if "whole" in part else tensor
        if "A" in part:
            out = out + (part["B"].float() @ part["A"].float()) * self._scale(name)
        if "embedding_A" in part:
            delta = (part["embedding_B"].float() @ part["embedding_A"].float()).T * self._scale(name)
            out = out + delta.to(tensor.dtype)
        if "shift" in part:
            out = out + part["shift"].float() * self._scale(name)
        return out.to(tensor.dtype)

    def wanted(self, name: str, shape: list[int]) -> dict[str, list[int]]:
        """Return the shapes that the parts of one tensor of this shape must have."""
        rank, wanted = self._rank(name), {"whole": shape, "shift": shape}
        if len(shape) == 2:
            rows, columns = shape
            wanted |= {"A": [rank, columns], "B": [rows, rank]}
            wanted |= {"embedding_A": [rank, rows], "embedding_B": [columns, rank]}
        return wanted

    def untouched(self) -> list[str]:
        """Return the modules that adapter_config.json targets by a name of which the file holds nothing."""
        targets = self.said.get("target_modules")
        if self.said.get("exclude_modules") or self.said.get("layers_to_transform") is not None:
            return []
        changed = {name.rpartition(".")[0] for name, parts in self.parts.items() if parts.keys() - {"whole"}}
        names = targets if isinstance(targets, list) else []
        return [str(t) for t in names if not any(f".{m}".endswith(f".{t}") for m in changed)]

    def unknown(self) -> list[str]:
        """Return the keys of adapter_config.json that say something, and of which neither peft nor llmq knows."""
        return sorted(printable(k, 80) for k, v in self.said.items() if v and k not in _KNOWN)

    def _refuse_other_kinds(self) -> None:
        said, where = self.said, self._where
        kind = field(said, "peft_type", str, where)
        if kind != "LORA":
            raise LlmqError(f"{where}: an adapter of kind {kind}, where llmq adds LoRA; {_MERGE}")
        for key in _OTHER_SUMS:
            if said.get(key):
                raise LlmqError(f"{where}: {key} is {printable(repr(said[key]), 80)}, which is no plain LoRA; {_MERGE}")
        start = said.get("init_lora_weights", True)
        if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
            raise LlmqError(
                f"{where}: init_lora_weights {printable(repr(start), 80)} has moved the base's weights too; {_MERGE}"
            )

    def _read(self) -> dict[str, dict[str, Entry]]:
        """Return the tensors by the base's tensor that they change, and by their part in it."""
        parts: dict[str, dict[str, Entry]] = {}
        for name, entry in tensor_entries(self.file).items():
            plain = name.removeprefix("base_model.model.")
            end = next((e for e in _ROLES if plain.endswith(f".{e}")), None)
            if end is None or entry.dtype not in ("F32", "F16", "BF16"):
                raise LlmqError(f"{self.file}: tensor {name} ({entry.dtype}) is no part of a LoRA adapter; {_MERGE}")
            leaf, role = _ROLES[end]
            target = f"{plain.removesuffix(f'.{end}')}.{leaf}"
            if role in parts.setdefault(target, {}):
                raise LlmqError(f"{self.file} changes {target} twice ({name}); save the adapter again")
            parts[target][role] = entry
        if not parts:
            raise LlmqError(f"{self.file} holds no tensor; save the adapter again")
        return parts

    def _rank(self, name: str) -> int:
        rank = self._pattern("rank_pattern", name, field(self.said, "r", int, self._where))
        if not isinstance(rank, int) or rank < 1:
            raise LlmqError(f"{self._where}: the rank of {name} is {rank}; save the adapter again")
        return rank

    def _scale(self, name: str) -> float:
        """Return alpha over the rank, or over its root."""
        alpha = self._pattern("alpha_pattern", name, field(self.said, "lora_alpha", float, self._where))
        if not abs(alpha) < _LARGEST:
            raise LlmqError(f"{self._where}: the alpha of {name} is no number that a weight could bear")
        rslora = field(self.said, "use_rslora", bool, self._where, False)
        return alpha / math.sqrt(self._rank(name)) if rslora else alpha / self._rank(name)

    def _pattern(self, key: str, name: str, default: float) -> float:
        """Return the value of the first pattern that a module's name ends with, as peft's get_pattern_key has it."""
        module = name.rpartition(".")[0]
        for pattern in field(self.said, key, dict, self._where, {}) if self.said.get(key) is not None else {}:
            try:
                matches = regex.match(rf"(.*\.)?({pattern})$", module, timeout=_SECONDS)
            except (regex.error, TimeoutError) as e:
                raise LlmqError(
                    f"{self._where}: {key} {printable(pattern, 80)} cannot be matched ({one_line(e)})"
                ) from e
            if matches:
                return field(self.said[key], pattern, float, f"{self._where}, {key}")
        return default


class Adapted(View):
    """A checkpoint with an adapter added, each tensor as it is read. The skeleton's source has the model's names.

    Raises LlmqError for an adapter that was made for another model.
    """

    def __init__(self, skeleton: Skeleton, adapter: Adapter) -> None:
        super().__init__(skeleton.source)
        self._added = adapter
        self.origin = dataclasses.replace(self.origin, adapter=adapter.record())
        self._refuse_tied(skeleton)
        for name, parts in adapter.parts.items():
            self._check(name, parts)
        missing = [t for t in adapter.untouched() if any(f".{n}".endswith(f".{t}.weight") for n in self.names())]
        if missing:
            raise LlmqError(
                f"{adapter.file} holds nothing for {missing[0]}, a target module of its {ADAPTER}; save it again"
            )
        self.warnings += self._warnings()

    def get(self, name: str) -> Tensor:
        """Return one tensor with the adapter's part added, in its stored dtype."""
        return self._added.added(name, self.base.get(name))

    def _refuse_tied(self, skeleton: Skeleton) -> None:
        """Refuse a change of an embedding that is the head too: peft's own answers differ before and after merging."""
        model = skeleton.model
        embedding, head = (
            f"{skeleton.name_of(m)}.weight" for m in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        changed = [n for n in (embedding, head) if n in self._added.parts]
        if changed and head not in self:
            raise LlmqError(
                f"{self._added.file} changes {changed[0]}, and the head of {self.path} is its embedding; {_MERGE}"
            )

    def _check(self, name: str, parts: Mapping[str, Entry]) -> None:
        """Refuse what the base does not have, has in another shape, or has half of."""
        file, other_model = self._added.file, "the adapter was made for another model"
        if name not in self:
            raise LlmqError(f"{file} changes {name}, which {self.path} does not have; {other_model}")
        shape = list(self._entries[name].shape)
        wanted = self._added.wanted(name, shape)
        for role, entry in parts.items():
            other = role.translate(str.maketrans("AB", "BA"))
            if other != role and other not in parts:
                raise LlmqError(f"{file}: tensor {entry.name} lacks its other factor; save the adapter again")
            if list(entry.shape) != wanted.get(role):
                raise LlmqError(
                    f"{file}: tensor {entry.name} is {list(entry.shape)}, where {name} {shape} asks for "
                    f"{wanted.get(role)}; {other_model}"
                )

    def _warnings(self) -> Iterator[str]:
        base = self._added.said.get("base_model_name_or_path")
        if is_repository(base) and is_repository(self.origin.name) and base != self.origin.name:
            yield f"the adapter {self._added.folder} was trained on {base}, not on {self.origin.name}"
        for name in ("tokenizer.json", "chat_template.jinja"):
            own, kept = self._added.folder / name, self.path / name
            if own.is_file() and not (kept.is_file() and filecmp.cmp(own, kept, shallow=False)):
                yield f"the adapter {self._added.folder} has another {name} than its base; the base's goes to OUT"
        if unknown := self._added.unknown():
            yield f"{ADAPTER} of the adapter has {', '.join(unknown[:5])}, which has no effect"
