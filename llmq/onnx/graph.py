"""An ONNX graph being written: nodes in their order, small tensors among them, large ones in a file beside it at once.

    with Graph(folder, torch.float32) as graph:
        w = graph.constant("w", torch.ones(64, 64))                     its bytes are in the file when this returns
        graph.node("MatMul", ["x", w], "y")
        graph.save(opsets={"": 21}, ir_version=10)                      model.onnx beside model.onnx.data

So one tensor is in memory at a time, and no limit of 2 GB is met. The same calls make the same bytes.
External tensors begin at multiples of 4096, as onnxruntime maps them.
Source: onnx.proto (TensorProto.external_data; 4-bit integers lie two in a byte, the first in the low bits).
Not here: what the nodes compute (decoder.py and the dialects).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from llmq import __version__
from llmq.checkpoint.disk import writing
from llmq.errors import LlmqError, one_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGN = 4096
_SMALL = 1024  # bytes; below, a tensor lies in the graph, where readers that infer shapes look for it
_KINDS = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int32: "INT32",
    torch.int64: "INT64", torch.uint8: "UINT8", torch.int8: "INT8", torch.bool: "BOOL",
}  # fmt: skip
Dim = str | int


def kind_of(dtype: torch.dtype | str) -> int:
    """Return ONNX's number of a dtype, or of the name of one that torch has not, such as "INT4"."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(dtype if isinstance(dtype, str) else _KINDS[dtype]))


class Graph:
    """A graph in a folder; a context manager that closes the file of large tensors.

    io: the dtype of its activations, and so of all float tensors in it. digests: sha256 of every tensor's bytes, by
    name, taken from memory.
    """

    def __init__(self, folder: Path, io: torch.dtype) -> None:
        self.folder, self.io = folder, io
        self.digests: dict[str, str] = {}
        self._nodes: list[NodeProto] = []
        self._tensors: list[TensorProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with writing(self.folder / DATA):
            self._data = self._open.enter_context((self.folder / DATA).open("wb"))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[Dim]) -> str:
        """Declare an input; dimensions are numbers or names. Returns its name."""
        self._inputs.append(_declared(name, dtype, shape))
        return name

    def output(self, name: str, dtype: torch.dtype, shape: Sequence[Dim]) -> None:
        """Declare an output, the value of that name."""
        self._outputs.append(_declared(name, dtype, shape))

    def node(self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any) -> str:
        """Add a node; "" leaves an input or output out. Returns the name of the first output.

        op: its name, behind its domain where that is not ONNX's own.
        """
        from onnx import helper

        names = [outputs] if isinstance(outputs, str) else list(outputs)
        domain, _, kind = op.rpartition(".")
        self._nodes.append(helper.make_node(kind, inputs, names, f"/{names[0]}", domain=domain, **attributes))
        return names[0]

    def constant(self, name: str, value: Tensor, kind: str | None = None, shape: Sequence[int] | None = None) -> str:
        """Add a tensor, on the CPU. Returns its name.

        kind, shape: of what the bytes of `value` mean where that is no dtype of torch: 4-bit integers, packed.
        """
        from onnx import TensorProto

        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        made = TensorProto(name=name, data_type=kind_of(kind or value.dtype), dims=shape or value.shape)
        if len(raw) < _SMALL:
            made.raw_data = raw.tobytes()
        else:
            self._put(made, raw)
        self.digests[name] = hashlib.sha256(raw.data).hexdigest()
        self._tensors.append(made)
        return name

    def numbers(self, name: str, *values: int) -> str:
        """Add int64 `[n]`. Returns its name."""
        return name if name in self.digests else self.constant(name, torch.tensor(values))

    def index(self, name: str, value: int) -> str:
        """Add one int64, `[]`. Returns its name."""
        return name if name in self.digests else self.constant(name, torch.tensor(value))

    def scalar(self, name: str, value: float) -> str:
        """Add one number in the graph's dtype, `[]`. Returns its name."""
        return name if name in self.digests else self.constant(name, torch.tensor(value, dtype=self.io))

    def save(self, opsets: Mapping[str, int], ir_version: int) -> None:
        """Write model.onnx. opsets: the version of each domain."""
        from onnx import helper

        graph = helper.make_graph(self._nodes, "model", self._inputs, self._outputs, initializer=self._tensors)
        ids = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        model: ModelProto = helper.make_model(
            graph, opset_imports=ids, ir_version=ir_version, producer_name="llmq", producer_version=__version__
        )
        with writing(self.folder / MODEL):
            self._data.flush()
            (self.folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))

    def _put(self, made: TensorProto, raw: Any) -> None:
        """Append the bytes of a tensor to the file of large ones, and let it say where they are."""
        from onnx import TensorProto

        with writing(self.folder / DATA):
            self._data.write(b"\0" * (-self._data.tell() % ALIGN))
            place = {"location": DATA, "offset": self._data.tell(), "length": len(raw)}
            self._data.write(raw.data)
        made.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            made.external_data.add(key=key, value=str(value))


def _declared(name: str, dtype: torch.dtype, shape: Sequence[Dim]) -> ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, kind_of(dtype), list(shape))


def checked(folder: Path) -> None:
    """Raise LlmqError where onnx finds fault with a model in a folder."""
    import onnx

    try:
        onnx.checker.check_model(folder / MODEL)
    except onnx.checker.ValidationError as e:
        raise LlmqError(f"what was written is not right: {one_line(e)}") from e


def stored_tensors(folder: Path) -> Iterator[tuple[str, TensorProto, bytes]]:
    """Read the tensors of a model in a folder back: the name, what the graph says of each, and its bytes."""
    import onnx

    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    with (folder / DATA).open("rb") as data:
        yield from ((t.name, t, _bytes(t, data)) for t in graph.initializer)


def _bytes(tensor: TensorProto, data: Any) -> bytes:
    place = {e.key: e.value for e in tensor.external_data}
    if not place:
        return bytes(tensor.raw_data)
    data.seek(int(place["offset"]))
    return bytes(data.read(int(place["length"])))
