"""What torch.compile launches on a GPU, counted without one: Inductor's Triton code for a device that is described.

    launched(model, ids)  ->  {"torch": 13, "int8_product": 8, "mm": 1}

The graph is that which the model has on a CPU, with fake tensors of a GPU in the place of its own. Inductor decides by
sizes, and by the number of multiprocessors, what goes into one kernel; the code that it writes is read, not compiled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

H100 = SimpleNamespace(
    name="H100", gcnArchName="", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10,
)  # fmt: skip
_CALL = re.compile(r"^ +(?:buf\d+ = )?(?:torch\.ops\.\w+\.(\w+)|extern_kernels\.(\w+)|triton_\w+\.(run))\b", re.M)


def launched(forward: Callable[..., Any], *args: Any, **named: Any) -> Counter[str]:
    """Return what a compiled call launches: Inductor's kernels as "torch", operators and the library's by name."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def kept(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=kept, decompositions=select_decomp_table())
    with torch.no_grad():
        torch.compile(forward, backend=backend, fullgraph=True)(*args, **named)
    names = [next(filter(None, found)) for each in graphs for found in _CALL.findall(code(*each))]
    return Counter("torch" if name == "run" else name for name in names)


def code(graph: fx.GraphModule, inputs: list[Any]) -> str:
    """Return the program that Inductor writes for a graph of a CPU, were it one of an H100."""
    mode = FakeTensorMode()
    with mode, _described():
        for node in graph.graph.nodes:
            node.args, node.kwargs = (fx.node.map_aggregate(given, _moved) for given in (node.args, node.kwargs))
        for name, constant in graph.named_buffers():
            setattr(graph, name, _moved(constant))
        graph.recompile()
        moved = [_moved(x) for x in inputs]
        there = make_fx(graph)(*moved)
        with V.set_fake_mode(mode):
            post_grad_passes(there, is_inference=True)
            lowering = GraphLowering(there, example_inputs=moved, is_inference=True)
        with V.set_fake_mode(mode), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*moved)
            return str(lowering.codegen()[0].value)


def _moved(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cuda", 0)
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")


@contextmanager
def _described() -> Iterator[None]:
    """Answer what Inductor asks of a device."""
    answers: list[tuple[Any, str, Any]] = [
        (interface, name, staticmethod(lambda *_, answer=answer: answer))
        for interface in (CudaInterface, CudaInterface.Worker)
        for name, answer in (("get_device_properties", H100), ("current_device", 0))
    ]
    answers += [(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90))]
    answers += [(CudaInterface, "is_available", staticmethod(lambda: True))]
    answers += [(torch.cuda, "is_available", lambda: True), (torch.cuda, "current_device", lambda: 0)]
    answers += [(torch.cuda, "get_device_properties", lambda *_: H100)]
    answers += [(torch.cuda, "get_device_capability", lambda *_: (9, 0))]
    answers += [(scheduler, "has_triton", lambda: True)]
    answers += [(torch.utils._triton, "triton_hash_with_backend", lambda: "none")]
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    with ExitStack() as stack:
        for where, name, answer in answers:
            stack.enter_context(patch.object(where, name, answer))
        stack.enter_context(patch.object(driver, "_active", target))
        yield
