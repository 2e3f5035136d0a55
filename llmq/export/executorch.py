"""ExecuTorch: a program for phones, 4-bit codes kept in XNNPACK's kernels, which round inputs to 8 bits a token.

    model.pte      forward(input_ids int64 [1, T], cache_position int64 [T]) -> logits float32 [1, T, V];
                   the cache of `context` tokens is within it; get_max_seq_len, get_vocab_size, get_eos_ids ...
    config.json    the source's, without its quantization_config
    export.json    what became of the linears; checksums of all files; the logits that `verify` finds again
    and the tokenizer, chat templates and generation settings as they were

What XNNPACK computes with (executorch 1.5, `backends/xnnpack`, "8da4w"): symmetric codes of 4 bits in groups of a
multiple of 32 columns, scales above 0 that bfloat16 holds. Other scales it rounds in silence, other zero points it
computes with wrongly, and a file with negative scales does not load: all three are refused.
Source: torchao's `IntxUnpackedToInt8Tensor`, transformers' `TorchExportableModuleForDecoderOnlyLM` (a static cache).
Not here: which checkpoint (_target.py).
"""

from __future__ import annotations

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
_TOKENS = 8  # whose logits are recorded, and found again by the runtime
_CLOSE = 0.02  # of the largest logit: XNNPACK's sums against torch's, inputs rounded alike but at ties
_REMEDY = "quantize the float model with --for executorch --group-size 32"


@dataclass(frozen=True)
class ExecuTorch(OfCodes):
    """A program that ExecuTorch runs by XNNPACK.

    context: how many tokens the cache holds.
    """

    context: Annotated[int, Between(_TOKENS, 2**20)] = 2048

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
        ids = torch.arange(_TOKENS)[None] % int(model.config.vocab_size)
        with torch.no_grad():
            said = model(ids).logits[0, -1].float()
        with writing(out.stage / _PROGRAM):
            (out.stage / _PROGRAM).write_bytes(_program(model, opened, self.context))
        out.copy_files(opened.folder)
        out.json("config.json", without_quantization(opened.source.config))
        target, outcomes = {"executorch": asdict(self)}, {EXACT: len(opened.linears)}
        ran = {"ids": ids.tolist(), "logits": said.tolist()}
        return close(out, opened, target, outcomes, opened.warnings, ("ExecuTorch",), **ran)

    def verify(self, out: Sink) -> None:
        """Run the program on a few tokens. Raises LlmqError where it does not give the logits that were recorded."""
        said = json_object(out.stage / EXPORTED)
        ids, wanted = torch.tensor(said["ids"]), torch.tensor(said["logits"])
        found = Program(out.stage / _PROGRAM)(ids, torch.arange(ids.shape[1]))[0, -1]
        off = float((found - wanted).abs().max() / wanted.abs().max())
        if not off < _CLOSE:
            raise LlmqError(
                f"ExecuTorch computes other logits than the model has (off by {off:.2g} of the largest): "
                "this model_type does not go through its static cache"
            )


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
            held: Tensor = IntxUnpackedToInt8Tensor(
                codes, scale, zero, int4, block, torch.float32, "int8_asym_per_token"
            )
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
    from executorch.exir import to_edge_transform_and_lower
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    cache = {"batch_size": 1, "max_cache_len": context}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    length = torch.export.Dim("length", min=1, max=context - 1)
    where = f"{opened.source.path} (model_type {opened.config.model_type!r}): ExecuTorch does not take it"
    with foreign(where), torch.no_grad():
        exported = TorchExportableModuleForDecoderOnlyLM(model, 1, context).export(
            input_ids=torch.arange(_TOKENS)[None],
            cache_position=torch.arange(_TOKENS),
            dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
        )
        lowered = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
            constant_methods=_constants(opened, context),
        )
        return bytes(lowered.to_executorch().buffer)


def _constants(opened: Packed, context: int) -> dict[str, Any]:
    """Return what ExecuTorch's runner of language models asks a program."""
    config, ends = opened.config, opened.config.eos_token_id
    said = {"get_bos_id": config.bos_token_id, "get_eos_ids": ends if isinstance(ends, list) else [ends]}
    known = {name: value for name, value in said.items() if value not in (None, [None])}
    sizes = {"get_max_seq_len": context, "get_max_context_len": context, "get_vocab_size": int(config.vocab_size)}
    return {**sizes, "use_kv_cache": True, "enable_dynamic_shape": True, **known}
