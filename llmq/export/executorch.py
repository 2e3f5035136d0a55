"""ExecuTorch: a program for phones, 4-bit codes kept in XNNPACK's kernels, which round inputs to 8 bits a token.

    model.pte      forward(input_ids int64 [1, T], cache_position int64 [T]) -> logits float32 [1, T, V];
                   the cache of `context` tokens is within it; get_max_seq_len, get_vocab_size, get_eos_ids ...
    config.json    the source's, without its quantization_config
    export.json    what became of the linears; checksums of all files; the logits that `verify` finds again
    and the tokenizer, chat templates and generation settings as they were

What XNNPACK computes with (executorch 1.5, `backends/xnnpack`, "8da4w"): symmetric codes of 4 bits in groups of a
multiple of 32 columns, scales above 0 that bfloat16 holds. Other scales it rounds in silence, other zero points it
computes with wrongly, and a file with negative scales does not load: all three are refused.

What is checked: that the codes and scales of every linear lie in the program bit for bit, and that it computes what
torch does with them. Two that round inputs to 8 bits agree to the last bits of float32 until an input lies so near the
middle of two codes that the order of a sum decides; that code moves what follows, which moves more codes, and some
blocks on the two round independently. How far that goes is measured for each token: torch against itself, the outputs
of linears moved by less than a rounding of float32 or two. Tokens that meet no such input hold the program to 80 dB.
Source: torchao's `IntxUnpackedToInt8Tensor`, transformers' `TorchExportableModuleForDecoderOnlyLM` (a static cache).
Not here: which checkpoint (_target.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from llmq.checkpoint import Sink
from llmq.checkpoint.dialects import without_quantization
from llmq.checkpoint.disk import writing
from llmq.checkpoint.place import EXPORTED
from llmq.export._record import close
from llmq.export._target import EXACT, OfCodes, Packed, finite, open_packed, refuse_rounding
from llmq.granularity import PerGroup
from llmq.guard.reading import json_object
from llmq.model.pretrained import blank_model, foreign
from llmq.options import Between
from llmq.progress import Progress
from llmq.types import AffineGrid, LinearSpec, LlmqError, Params, QTensor

_PROGRAM = "model.pte"
_INPUTS = "int8_asym_per_token"  # torchao's name of the inputs that XNNPACK rounds
_PROMPTS, _TOKENS = 32, 2  # whose logits are recorded, and found again by the runtime
_COLUMNS = 32  # of their logits, spread over the vocabulary
_JITTER, _DRAWS = 3e-7, 3  # by how much outputs of linears are moved, relative: sums in another order move them as much
_FLOOR = 1e-8  # of the power of a token's logits, what moved outputs cost at least
_FEW, _APART = 0.25, 4.0  # of the prompts may be off by more than so many times that power
_LEAST = 16  # tokens of a cache
_REMEDY = "quantize the float model with --for executorch --group-size 32"


@dataclass(frozen=True)
class ExecuTorch(OfCodes):
    """A program that ExecuTorch runs by XNNPACK.

    context: how many tokens the cache holds.
    """

    context: Annotated[int, Between(_LEAST, 2**20)] = 2048

    bare = "context"
    extra = "executorch"
    packages = ("executorch", "torchao")
    falls: ClassVar[bool] = False
    scales: ClassVar[str | None] = "bfloat16"
    runtime: ClassVar[str] = "XNNPACK"

    def open(self, src: str, requantize: str | None) -> Packed:
        """See `Target.open`."""
        refuse_rounding(requantize, "executorch", "compressed-tensors:scales=bfloat16")
        return open_packed(src)

    def check(self, opened: Packed) -> list[str]:
        """Refuse grids that XNNPACK does not compute with, and a folder without a tokenizer."""
        for linear in opened.linears:
            if (why := obstacle(linear)) is not None:
                raise LlmqError(f"{linear.name}: XNNPACK computes with {why}: {_REMEDY}")
        opened.tokenizer()
        return ["XNNPACK rounds the inputs of every quantized linear to 8 bits a token, as W4A8 does"]

    def write(self, opened: Packed, out: Sink, step: Progress) -> dict[str, Any]:
        """See `Target.write`. The model is in memory as a whole, a byte a code."""
        model = _filled(opened, step)
        ran = recorded(model)
        program = _program(model, opened, self.context)
        for name, found in opened.packed:
            if isinstance(found, QTensor):
                require_held(program, name, *levels(name, found))
        with writing(out.stage / _PROGRAM):
            (out.stage / _PROGRAM).write_bytes(program)
        out.copy_files(opened.folder)
        out.json("config.json", without_quantization(opened.source.config))
        target, outcomes = {"executorch": asdict(self)}, {EXACT: len(opened.linears)}
        return close(out, opened, target, outcomes, opened.warnings, ("ExecuTorch",), **ran)

    def verify(self, out: Sink) -> None:
        """Run the program on a few tokens. Raises LlmqError where it does not give the logits that were recorded."""
        said = json_object(out.stage / EXPORTED)
        found = answers(Program(out.stage / _PROGRAM), torch.tensor(said["ids"]))
        require_close(found, torch.tensor(said["logits"]), torch.tensor(said["moved"]))


def obstacle(linear: LinearSpec) -> str | None:
    """Return what XNNPACK computes with, in words, where a linear is something else; None where it is that."""
    grid = linear.scheme.weight
    if not isinstance(grid, AffineGrid) or grid.bits != 4 or not grid.sym:
        return "symmetric integers of 4 bits"
    if not isinstance(grid.granularity, PerGroup) or grid.granularity.columns(linear.K) % 32:
        return "groups of a multiple of 32 columns"
    return None if linear.scheme.activation is None else "inputs that it rounds itself, not by scales of the checkpoint"


def levels(name: str, q: QTensor) -> tuple[Tensor, Tensor]:
    """Return the codes less their zero point, int8 `[N, K]`, and the scales, float32 `[N, G]`.

    Raises LlmqError where the groups are not those of the columns, and for scales that XNNPACK would round.
    """
    params = Params.of(q.params)
    if q.g_idx is not None:
        raise LlmqError(f"{name}: its groups follow the activation order (desc_act), not the columns: {_REMEDY}")
    scale = params.scale.float()
    if off := int((scale.bfloat16().float() != scale).sum()):
        raise LlmqError(f"{name}: XNNPACK rounds scales to bfloat16, and {off:,} are none: {_REMEDY}")
    return (q.codes.to(torch.int16) - params.zero[:, q.group_K].to(torch.int16)).to(torch.int8), scale


def require_held(program: bytes, name: str, codes: Tensor, scale: Tensor) -> None:
    """Raise LlmqError where a program does not hold the `levels` of a linear bit for bit, as XNNPACK packs them.

    uint8 `[N, K / 2]`, the code plus 8, even columns in the low 4 bits; bfloat16 `[N, G]`.
    """
    shifted = (codes + 8).to(torch.uint8)
    packed, scales = shifted[:, ::2] | shifted[:, 1::2] << 4, scale.bfloat16().view(torch.uint8)
    for what, held in (("codes", packed), ("scales", scales)):
        if held.numpy().tobytes() not in program:
            raise LlmqError(f"{name}: its {what} are not in ExecuTorch's program, which does not give it to XNNPACK")


def require_close(found: Tensor, wanted: Tensor, moved: Tensor) -> None:
    """Raise LlmqError where logits are off by more than inputs that round elsewhere explain.

    found: `[2, P, T, C]`, see `answers`. wanted, moved: what the model says, `[P, T, C]`, and the power `[P, T]` by
    which that moves with the order of sums, see `recorded`.
    """
    off = (found - wanted).square().sum(-1) / moved
    worst = float(off.quantile(1 - _FEW, 1).max())
    if not worst <= _APART:
        raise LlmqError(
            f"ExecuTorch computes other logits than the model has: {worst:.3g} times the power by which they move when "
            f"8-bit inputs round elsewhere ({_APART:g} allowed): this model_type does not go through its static cache"
        )


class Program:
    """A program that is loaded, its cache with it. Raises LlmqError where ExecuTorch does not load it."""

    def __init__(self, file: Path) -> None:
        from executorch.runtime import Runtime

        self._file = file
        with foreign(f"{file}: ExecuTorch does not load it"):
            self._method = Runtime.get().load_program(file).load_method("forward")

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits, float32 `[1, T, V]`. ids: int64 `[1, T]`. positions: of the cache, int64 `[T]`."""
        with foreign(f"{self._file}: ExecuTorch does not run it"):
            (logits,) = self._method.execute([ids, positions])
        return torch.as_tensor(logits)


def answers(program: Callable[[Tensor, Tensor], Tensor], ids: Tensor) -> Tensor:
    """Return some logits of prompts, float32 `[2, P, T, C]`: of every prompt at once, then of its tokens one by one.

    program: of ids `[1, T]` and their positions in the cache, see `Program`. ids: int64 `[P, T]`.
    """
    places = torch.arange(ids.shape[1])
    ways = [[places], places.split(1)]
    said = [[torch.cat([_spread(program(p[None, at], at)) for at in way], 1) for p in ids] for way in ways]
    return torch.stack([torch.cat(prompts) for prompts in said])


def recorded(model: Any) -> dict[str, Any]:
    """Return prompts `[P, T]` spread over the vocabulary, some logits `[P, T, C]`, and the power by which they move."""
    size, count = int(model.config.vocab_size), _PROMPTS * _TOKENS
    ids = ((torch.arange(count) * size + size // 2) // count).view(_TOKENS, _PROMPTS).T.contiguous()
    wanted = _said(model, ids)
    moved = _FLOOR * wanted.square().sum(-1)
    for seed in range(_DRAWS):
        with _jittered(model, seed):
            moved = moved.maximum((_said(model, ids) - wanted).square().sum(-1))
    return {"ids": ids.tolist(), "logits": wanted.tolist(), "moved": moved.tolist()}


@contextmanager
def _jittered(model: nn.Module, seed: int) -> Iterator[None]:
    """Move the outputs of all linears by random numbers, as if their products were summed in another order."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return out * (1 + _JITTER * torch.randn(out.shape, generator=generator))

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@torch.no_grad()
def _said(model: Any, ids: Tensor) -> Tensor:
    return _spread(model(ids).logits.float())


def _spread(logits: Tensor) -> Tensor:
    """Return columns that are spread over the vocabulary, as many for all sizes."""
    return logits[..., torch.arange(_COLUMNS) * logits.shape[-1] // _COLUMNS]


def _filled(opened: Packed, step: Progress) -> Any:
    """Return transformers' model, its quantized weights torchao's tensors of the same codes, the rest float32."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    model = blank_model(opened.source, opened.config, buffers=True)
    state = {}
    for name, found in opened.weights(step):
        if isinstance(found, QTensor):
            codes, scale = levels(name.removesuffix(".weight"), found)
            block = (1, codes.shape[1] // scale.shape[1])
            zero, int4 = torch.zeros(scale.shape, dtype=torch.int8), vars(torch)["int4"]  # not in torch's stubs
            held: Tensor = IntxUnpackedToInt8Tensor(codes, scale, zero, int4, block, torch.float32, _INPUTS)
        else:
            held = finite(name, found).float()
        state[name] = nn.Parameter(held, requires_grad=False)
    with foreign(f"{opened.source.path} does not fill its own model"):
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
    return model.requires_grad_(False)


def _program(model: Any, opened: Packed, context: int) -> bytes:
    """Return the lowered program. Raises LlmqError where torch.export or ExecuTorch does not take the model."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.backends.xnnpack.utils.configs import get_xnnpack_edge_compile_config
    from executorch.exir import to_edge_transform_and_lower
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    cache = {"batch_size": 1, "max_cache_len": context}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    length = torch.export.Dim("length", min=1, max=context - 1)
    where = f"{opened.source.path} (model_type {opened.config.model_type!r}): ExecuTorch does not take it"
    with foreign(where), torch.no_grad():
        exported = TorchExportableModuleForDecoderOnlyLM(model, 1, context).export(
            input_ids=torch.arange(_LEAST // 2)[None],
            cache_position=torch.arange(_LEAST // 2),
            dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
        )
        lowered = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
            constant_methods=_constants(opened, context),
            compile_config=get_xnnpack_edge_compile_config(skip_dim_order=True),
        )
        return bytes(lowered.to_executorch().buffer)


def _constants(opened: Packed, context: int) -> dict[str, Any]:
    """Return what ExecuTorch's runner of language models asks a program."""
    config, ends = opened.config, opened.config.eos_token_id
    said = {"get_bos_id": config.bos_token_id, "get_eos_ids": ends if isinstance(ends, list) else [ends]}
    known = {name: value for name, value in said.items() if value not in (None, [None])}
    sizes = {"get_max_seq_len": context, "get_max_context_len": context, "get_vocab_size": int(config.vocab_size)}
    return {**sizes, "use_kv_cache": True, "enable_dynamic_shape": True, **known}
