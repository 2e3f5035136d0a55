"""A graph on disk: large tensors beside it at aligned places, the same bytes for the same calls, read by onnx."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from llmq.onnx.graph import ALIGN, DATA, MODEL, Graph, checked, stored_tensors
from llmq.types import LlmqError

LARGE = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))


def write(folder):
    folder.mkdir(exist_ok=True)
    with Graph(folder, torch.float32) as graph:
        x = graph.input("x", torch.float32, ["rows", 60])
        graph.constant("w", LARGE)
        graph.constant("narrow", LARGE.bfloat16())
        graph.constant("nibbles", torch.arange(3, dtype=torch.uint8), "UINT4", (5,))
        assert graph.scalar("half", 0.5) == graph.scalar("half", 0.5)
        graph.node("Mul", [graph.node("MatMul", [x, "w"], "product"), "half"], "y")
        graph.output("y", torch.float32, ["rows", 50])
        graph.save({"": 21}, 10)
    return folder


def test_onnx_reads_what_was_written(tmp_path):
    folder = write(tmp_path / "a")
    checked(folder)
    tensors = {t.name: t for t in onnx.load(folder / MODEL).graph.initializer}
    assert np.array_equal(numpy_helper.to_array(tensors["w"]), LARGE.numpy())
    narrow = numpy_helper.to_array(tensors["narrow"]).astype(np.float32)
    assert np.array_equal(narrow, LARGE.bfloat16().float().numpy())
    assert numpy_helper.to_array(tensors["nibbles"]).astype(int).tolist() == [0, 0, 1, 0, 2]


def test_large_tensors_begin_at_multiples_of_a_page(tmp_path):
    folder = write(tmp_path / "a")
    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    places = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "offset"]
    assert len(places) == 2 and all(place % ALIGN == 0 for place in places)
    assert (folder / MODEL).stat().st_size < 2000 < (folder / DATA).stat().st_size


def test_the_same_calls_make_the_same_bytes(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in (MODEL, DATA))


def test_tensors_are_read_back_as_their_bytes(tmp_path):
    found = {name: raw for name, _, raw in stored_tensors(write(tmp_path / "a"))}
    assert found["w"] == LARGE.numpy().tobytes() and found["nibbles"] == bytes([0, 1, 2])


def test_a_graph_that_onnx_finds_fault_with_is_one_line(tmp_path):
    with Graph(tmp_path, torch.float32) as graph:
        graph.node("Relu", ["nowhere"], "y")
        graph.output("y", torch.float32, [1])
        graph.save({"": 21}, 10)
    with pytest.raises(LlmqError, match="not right: .*nowhere"):
        checked(tmp_path)
