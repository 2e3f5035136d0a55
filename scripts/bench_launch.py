"""Python's share of a linear on a GPU, measured on a CPU: every Triton launch is left out (_launches.py).

    python scripts/bench_launch.py [--rounds 20] [--tokens]

Prints microseconds of processor time a call, the least of the rounds of 1000 calls: of a layer that llmq.load makes, of
its operator as torch.compile calls it, and of nn.Linear on 4 x 4 numbers, which is what torch takes at the least.
Triton's own launcher, which is left out, comes on top of every launch; what it takes only a GPU can say.
--tokens: of a token of a small Llama instead, as it is, compiled, and as a graph (_graphs.py), which is not computed.
What torch's own operators compute is in the first two; of so small tensors it is little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _measure as measure
import torch
from _graphs import Graphs
from _launches import BACKENDS, counted
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import llmq
from llmq.grids.int import Int
from llmq.grids.nvfp4 import Nvfp4
from llmq.integrations.compiled import compile_for_generation
from llmq.runtime.backends._triton import Site
from llmq.types import LinearSpec, QTensor, RangedGrid, Scheme
from llmq_kernels import grouped, grouped_int8, routing

SCHEMES: dict[str, tuple[RangedGrid, RangedGrid | None, int]] = {  # weights, activations, K
    "int4 g128": (Int(4, True, 128), None, 256),
    "int4 g128, K split": (Int(4, True, 128), None, 4096),
    "nvfp4": (Nvfp4(), None, 256),
    "W8A8": (Int(8, True, "channel"), Int(8, True, "channel"), 256),
}


def microseconds(call: Callable[[], object], rounds: int, calls: int = 1000) -> float:
    """Return the processor time of a call, the least of some rounds."""
    found = []
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(calls):
            call()
        found.append(time.process_time() - began)
    return min(found) * 1e6 / calls


def layer(grid: RangedGrid, activation: RangedGrid | None, K: int) -> Any:
    """Return the prepacked weight `[256, K]` of a scheme, as a GPU's back-end holds it."""
    q, spec = QTensor.rounded(torch.randn(256, K), grid), LinearSpec("linear", 256, K, Scheme(grid, activation))
    return next(b for b in BACKENDS if b.refuses(spec, torch.device("cpu")) is None)(q, spec)


def rows(rounds: int) -> Iterator[str]:
    """Yield the lines of the table."""
    linear, x = torch.nn.Linear(4, 4, bias=False), torch.randn(1, 1, 4)
    yield f"| nn.Linear | {microseconds(lambda: linear(x), rounds):.1f} | | |"
    for name, (grid, activation, K) in SCHEMES.items():
        with counted() as counts:
            weight, x = layer(grid, activation, K), torch.randn(1, 1, K).half()
            weight(x)
            launches = counts.total()
            called = microseconds(lambda: weight(x), rounds)  # noqa: B023  called here
            args = operator_args(weight)
            as_operator = microseconds(lambda: args[0](x, *args[1:]), rounds)  # noqa: B023
        yield f"| {name} | {called:.1f} | {as_operator:.1f} | {launches} |"
    for name in ("int4 g128", "W8A8"):
        with counted() as counts:
            three, x = [layer(*SCHEMES[name]) for _ in range(3)], torch.randn(1, 1, 256).half()
            Site(three, [lambda: None] * 3)
            together(three, x)
            launches = counts.total()
            called = microseconds(lambda: together(three, x), rounds)  # noqa: B023  called here
        yield f"| {name}, three of one input together | {called:.1f} | | {launches} |"
    x, index = torch.randn(1, 256).half(), torch.arange(8)[None]
    for name, kernel in (("int4 g128", grouped), ("W8A8", grouped_int8)):
        with counted() as counts:
            weight, _ = kernel.stack([[layer(*SCHEMES[name]).packed] for _ in range(128)])
            plan = routing.plan(index, 128)
            kernel.linear(x, weight, plan)
            launches = counts.total() - 1
            called = microseconds(lambda: kernel.linear(x, weight, plan), rounds)  # noqa: B023  called here
        yield f"| {name}, 8 of 128 experts | {called:.1f} | | {launches} |"
    with counted():
        planned = microseconds(lambda: routing.plan(index, 128), rounds)
    yield f"| the plan of 128 experts | {planned:.1f} | | 1 |"


def tokens(rounds: int, blocks: int = 16) -> Iterator[str]:
    """Yield the lines of the table of tokens."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=320, num_hidden_layers=blocks, **shape)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(f"{folder}/float")
        llmq.quantize(f"{folder}/float", f"{folder}/int4", method="rtn", bits=4, format="compressed-tensors")
        for how in ("eager", "compiled", "graph"):
            with counted() as counts:
                model = llmq.load(f"{folder}/int4", device="cpu", dtype=torch.bfloat16)
                backend = {"compiled": "inductor", "graph": Graphs(counts, computing=False)}.get(how)
                if backend is not None:
                    compile_for_generation(model, backend=backend)
                    model.generation_config.compile_config._compile_all_devices = True
                yield token(how, model, counts, rounds)


def token(how: str, model: Any, counts: Counter[str], rounds: int) -> str:
    """Return the line of a model: of its forward, and of a step of `generate` around that."""
    cache, ids, clock = StaticCache(model.config, max_cache_len=64), torch.arange(2, 12)[None], Clock(counts)
    given = {"past_key_values": cache, "cache_implementation": None, "max_new_tokens": 40, "do_sample": False}
    forward, found = model.__call__, []
    for _ in range(rounds + 1):
        cache.reset()
        model.generate(ids, streamer=clock, eos_token_id=None, **given)
        if how != "eager":
            forward = model._compiled_call
        cache.reset()
        began = time.process_time()
        for _ in range(50):
            forward(ids[:, :1], past_key_values=cache)
        found.append(time.process_time() - began)
    return f"| {how} | {min(found) * 1e6 / 50:.0f} | {clock.least * 1e6:.0f} | {clock.launched} |"


class Clock:
    """A streamer that keeps the least processor time between two tokens, and what was launched between the last two."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts, self.least, self.launched = counts, float("inf"), 0
        self._then, self._counted = float("inf"), 0

    def put(self, ids: torch.Tensor) -> None:
        """Note a token."""
        now, counted = time.process_time(), self.counts.total()
        if self._then < now:
            self.least = min(self.least, now - self._then)
        self.launched, self._then, self._counted = counted - self._counted, now, counted

    def end(self) -> None:
        """Begin anew."""
        self._then = float("inf")


def together(weights: Sequence[Any], x: torch.Tensor) -> None:
    """Multiply one activation by all of some weights, as a block asks for them."""
    for weight in weights:
        weight(x)


def operator_args(weight: Any) -> tuple[Any, ...]:
    """Return the operator of a back-end and its arguments behind x."""
    ops, w = torch.ops.llmq, weight.packed
    if weight.name == "triton_w8a8":
        return ops.int8_linear, w.q, w.scale, None, None, w.N, w.K
    if weight.name == "triton_e2m1":
        return ops.e2m1_linear, w.words, w.params, None, *w.shape, w.factor
    return ops.weight_only_linear, w.words, w.params, w.order, None, *w.shape


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", action="store_true")
    options = parser.parse_args()
    print(measure.machine())
    names = (
        "token | us a forward | us a step of generate" if options.tokens else "layer | us a call | us as an operator"
    )
    print(f"| {names} | launches |\n|---|---|---|---|")
    with torch.no_grad() if options.tokens else torch.inference_mode():
        for line in (tokens if options.tokens else rows)(options.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
