"""A checkpoint scored with one block of it in memory at a time, however large it is.

    scored = Streamed("./my-70b-int4", "the model")
    for states in scored.each(windows):      # all windows pass block 0, then all of them block 1 ...
        scored.log_probs(states[:64])        # behind the last block: final norm and head are in memory

Each module computes what it computes in a model that `llmq.load` has opened, in the same dtype: floats as they are, the
linears of a quantized checkpoint packed, by the same back-end, so that activations that are quantized are. What the
windows are between two blocks lies in files of a temporary folder (in TMPDIR), twice their size while a block runs.
Experts alone may differ in rounding: transformers multiplies all of a layer's at once where they are float.
Not here: the windows and their scores (windows.py, scores.py), a whole model (loading.py).
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import as_floats, decoded_on_load
from llmq.checkpoint.packed import PackedCheckpoint, Packing
from llmq.errors import LlmqError
from llmq.integrations.transformers import place_linears
from llmq.model.device import device_of
from llmq.model.ends import logits, outside_loaded
from llmq.model.forward import Files, Forward
from llmq.model.pretrained import model_config
from llmq.model.skeleton import Read, Skeleton
from llmq.progress import Progress, Work
from llmq.runtime.embedding import TiedHead
from llmq.runtime.joining import join_sites
from llmq.runtime.linear import QuantLinear
from llmq.runtime.packed import PackedWeight


class Loaded(Skeleton):
    """A skeleton whose blocks compute as `llmq.load` would have them: packed linears packed, some floats in float32.

    Raises LlmqError as `Skeleton` and `PackedCheckpoint` do.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        super().__init__(source, dtype)
        if source.quantization is not None:
            entries = {n: e for n, e in source.entries().items() if n not in source.unread}
            place_linears(self.model, PackedCheckpoint(Packing(source.quantization), entries, self.model))
        self._packed = {n for n, m in self.model.named_modules() if isinstance(m, PackedWeight)}
        patterns = self.model._get_dtype_plan(dtype)  # what transformers keeps in float32
        self._kept = re.compile("|".join(p.replace("*", ".*") for p in patterns) or r"(?!)")

    def computed_in(self, name: str) -> torch.dtype | None:
        """See `Skeleton.computed_in`."""
        if name.rpartition(".")[0] in self._packed:
            return None
        return torch.float32 if self._kept.search(name) else self.dtype

    @contextmanager
    def loaded(
        self, i: int, device: torch.device, *, experts: bool = True, read: Read | None = None
    ) -> Iterator[nn.Module]:
        """See `Skeleton.loaded`."""
        with super().loaded(i, device, experts=experts, read=read) as block, _prepacked([block]):
            yield block


@contextmanager
def _prepacked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hand the packed linears below some modules to their back-ends, as loading does; empty them in the end."""
    linears = [m for module in modules for m in module.modules() if isinstance(m, QuantLinear | TiedHead)]
    for linear in linears:
        linear.prepack()
    for module in modules:
        join_sites(module)
    try:
        yield
    finally:
        for linear in linears:
            linear.empty()


class Streamed:
    """A checkpoint, float or quantized, as `scores.Predicts`.

    name: what messages call it. dtype: of the activations, None for the checkpoint's own, as `load` has it. work: is
    told of the blocks.
    Raises LlmqError as `load` and `Skeleton` do, and from `each` where the disk has no room for the states.
    """

    kv_bits: int | None = None

    def __init__(
        self,
        path: str | Path,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = "auto",
        work: Progress | None = None,
    ) -> None:
        source = Source(resolve(str(path)))
        if decoded_on_load(source.quantization):
            as_floats(source)
        self.skeleton = Loaded(source, dtype or _dtype(source))
        self.name, self.model, self.vocab = name, self.skeleton.model, self.skeleton.text.vocab_size
        self._device, self._work = device_of(device), Work.of(work)

    def each(self, windows: Sequence[list[int]]) -> Iterator[Tensor]:
        """Yield what each window is behind the last block, `[T, hidden]`, when all have passed all blocks."""
        skeleton, device = self.skeleton, self._device
        with tempfile.TemporaryDirectory(prefix="llmq-states-") as room:
            self._require(room, sum(map(len, windows)))
            forward = Forward(
                skeleton, (torch.tensor([ids]) for ids in windows), device, Files(Path(room), len(windows), device)
            )
            for i in range(len(skeleton)):
                self._work(i, len(skeleton), f"{self.name}, block {i}")
                forward.step(i)
            with self.ready():
                yield from (self._states(h) for h in forward.hidden)

    def log_probs(self, states: Tensor) -> Tensor:
        """Return the float32 log-probabilities `[T, vocab]` of some states of a window that `each` has just yielded."""
        return F.log_softmax(logits(self.skeleton, states[None])[0].float(), dim=-1)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """See `Predicts.ready`: the final norm and the head are in memory."""
        packed = [m for _, m in self.skeleton.around() if isinstance(m, QuantLinear | TiedHead)]  # the head, if any
        with outside_loaded(self.skeleton, self._device, head=True), _prepacked(packed):
            yield

    def rest(self) -> None:
        """See `Predicts.rest`: no block is in memory."""

    def _states(self, hidden: Tensor) -> Tensor:
        if hidden.dim() != 3 or len(hidden) != 1:
            raise LlmqError(
                f"{self.skeleton.source.path}: what its blocks hand on is {list(hidden.shape)}, not one state for a "
                "token; score it without --stream"
            )
        return hidden[0]

    def _require(self, room: str, tokens: int) -> None:
        free = shutil.disk_usage(room).free
        need = 2 * tokens * self.skeleton.text.hidden_size * self.skeleton.dtype.itemsize
        if need > free:
            raise LlmqError(
                f"the states of {tokens:,} tokens take {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free in "
                f"{room}; score fewer --windows, or name a place with room in TMPDIR"
            )


def _dtype(source: Source) -> torch.dtype:
    """Return what `load` computes in: what config.json says, else what the weights are stored in."""
    said = None if source.decoded else model_config(source).dtype
    return said if isinstance(said, torch.dtype) else source.dtype
