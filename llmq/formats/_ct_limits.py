"""What runtimes take of compressed-tensors files, and what of them some do not.

How each is known stands in docs/runtimes.md. Facts of small floats: vLLM 0.32 and 0.33
(`compressed_tensors.py:_get_scheme_from_parts` and the schemes beside it), SGLang 0.5, TensorRT-LLM's
`_torch/model_config.py`. Of embeddings: vLLM's `compressed_tensors_embedding.py`, whose kernel takes words of whole
codes and no zeros; vllm#45535, vllm#54304, sglang#36137, transformers#47920.
Not here: how a limit becomes a row or a warning (llmq/readers.py).
"""

from collections.abc import Sequence

from llmq.formats import _common
from llmq.formats._ct_arguments import same_scheme
from llmq.granularity import PerBlock, PerGroup, PerRow, PerTensor
from llmq.grids._float import FloatGrid
from llmq.grids._microscaling import Microscaling
from llmq.grids.fp8 import Fp8
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.readers import Limit, table
from llmq.types import AffineGrid, Grid, LinearSpec, RangedGrid

_NAME = "compressed-tensors"
READERS = table(
    ("transformers", True, "with compressed-tensors 0.20", "ran"),
    ("vLLM", True, "", "ran"),
    ("SGLang", True, "on GPUs", "source"),
    ("TensorRT-LLM", True, "one scheme for all, NVFP4 or FP8", "source"),
)
_TENSORRT = Limit(
    "it reads compressed-tensors of FP8 and FP4 alone, and takes our int8 for FP8",
    refuses=("TensorRT-LLM",),
    told=False,
)
_KV_INT8 = Limit(
    "vLLM 0.32 refuses to load a file with static int8 scales of the key-value cache (it takes fp8 ones, and its own "
    "int8 cache is dynamic); llmq and transformers read it: say --kv-dtype fp8 for vLLM",
    refuses=("vLLM",),
)
_KV_FP8 = (
    Limit("it keeps keys and values in fp8 by the file's scales", notes=("vLLM",), told=False),
    Limit("fp8 keys and values want --kv-cache-dtype fp8_e4m3", notes=("SGLang",), told=False, known="source"),
)


_TABLE_VLLM = Limit(
    "vLLM 0.32 looks up quantized embeddings on GPUs, of models whose code hands their embedding the quantization "
    "(Llama's does; Qwen3.5's and GPT-NeoX's stop at weight_packed: vllm#54304)",
    notes=("vLLM",),
    known="source",
)
_TABLE_TIED = Limit(
    "vLLM 0.32 makes no logits of a quantized embedding (vllm#45535), to which this head is tied: say --lm-head for a "
    "head of its own",
    refuses=("vLLM",),
    known="source",
)
_TABLE_TRANSFORMERS = Limit(
    "transformers 5.24 stops at a quantized embedding ('Embedding' object has no attribute 'weight', "
    "transformers#47920); llmq's register() and llmq.load read it",
    refuses=("transformers",),
)
_TABLE_SGLANG = Limit(
    "SGLang 0.5 leaves a quantized embedding unread and speaks rubbish (sglang#36137)",
    refuses=("SGLang",),
    known="source",
)


def limits(linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
    """Return what some runtimes do not take of linears. skipped: those that stay float."""
    floats = [s for s in linears if isinstance(s.scheme.weight, FloatGrid)]
    integers = [s for s in linears if not isinstance(s.scheme.weight, FloatGrid) and not s.embedding]
    found = [*_common.fused_limits(linears, skipped), *_of_weights(integers), *_of_activations(integers)]
    found += _of_embeddings(linears, skipped)
    found += [*_of_experts(_common.of_experts(integers)), *_of_floats(floats)]
    if integers:
        found.append(_TENSORRT)
    return list(dict.fromkeys(found))


def of_cache(strategy: str | None, dtype: str) -> list[Limit]:
    """Return what runtimes make of static scales of the key-value cache, None without."""
    if strategy is None:
        return []
    return list(_KV_FP8) if dtype == "fp8" else [_KV_INT8]


def _of_weights(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of linears whose weights alone are quantized."""
    grids = [_common.int_grid(s, _NAME) for s in linears if s.scheme.activation is None]
    limits = []
    if any(not grid.sym for grid in grids) and all(same_scheme(linears[0].scheme, s.scheme) for s in linears):
        say = (
            "stock transformers loads asymmetric pack-quantized weights only with "
            "CompressedTensorsConfig(dequantize=True)"
        )
        limits.append(Limit(say, notes=("transformers",)))
    elif any(not grid.sym for grid in grids):
        # 5.23, integrations/compressed_tensors.py: get_dense_scheme takes the first group for every module
        say = (
            "stock transformers cannot load asymmetric pack-quantized weights beside another scheme: dequantize=True, "
            "which they need, decodes every module by the first config group and so computes rubbish without a word"
        )
        limits.append(Limit(say, refuses=("transformers",)))
    if odd := sorted({grid.bits for grid in grids} - {4, 8}):
        widths = ", ".join(map(str, odd))
        say = f"vLLM 0.32 reads weights of {widths} bits on NVIDIA GPUs alone, with its humming kernels"
        limits.append(Limit(say, notes=("vLLM",), known="source"))
        limits.append(Limit(f"it takes 4 and 8 bits, not {widths}", refuses=("SGLang",), told=False))
    if any(grid.bits == 8 for grid in grids):
        say = "vLLM 0.32 reads 8-bit weights, alone or beside others, on GPUs, not on CPUs"
        limits.append(Limit(say, notes=("vLLM",), known="source"))
    if any(isinstance(grid.granularity, PerTensor) for grid in grids):
        say = "vLLM reads weight-only quantization per group or per channel, not per tensor"
        limits.append(Limit(say, refuses=("vLLM", "SGLang"), known="source"))
    return limits + _common.tile_limits([s for s in linears if s.scheme.activation is None])


def _of_embeddings(linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
    """Return what some runtimes do not take of embeddings; where there is no head, it is tied to one."""
    tables = [s for s in linears if s.embedding]
    if not tables:
        return []
    found = [_TABLE_TRANSFORMERS, _TABLE_SGLANG, _TABLE_VLLM, _TENSORRT]
    if odd := sorted({s.scheme.weight.bits for s in tables} - {2, 4, 8}):
        say = f"vLLM 0.32 looks up embeddings of 2, 4 and 8 bits, not of {', '.join(map(str, odd))}"
        found.append(Limit(say, refuses=("vLLM",), known="source"))
    others = [*(s.name for s in linears if not s.embedding), *skipped]
    return found if any(_common.block_path(n) is None for n in others) else [*found, _TABLE_TIED]


def _of_activations(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of linears whose inputs are quantized too."""
    both = [(_common.int_grid(s, _NAME), s.scheme.activation) for s in linears if s.scheme.activation is not None]
    limits = []
    if any(not grid.sym for grid, _ in both):
        limits.append(
            Limit("vLLM reads int8 activations with symmetric weights only", refuses=("vLLM",), known="source")
        )
    if any(not a.sym for _, a in both):
        say = (
            "vLLM 0.32 multiplies asymmetric activations right on NVIDIA GPUs (CUTLASS) and on CPUs with VNNI; its "
            "product saturates on other CPUs, where the model speaks rubbish, and AMD's GPUs do not have it"
        )
        limits.append(Limit(say, notes=("vLLM",)))
    if any(s.scheme.static for s in linears) or any(not a.sym for _, a in both):
        say = "SGLang 0.5 ignores static scales and zero points: it quantizes every token symmetrically"
        limits.append(Limit(say, notes=("SGLang",)))
    return limits


def _of_experts(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of experts, which they run as one."""
    grids: list[AffineGrid] = [_common.int_grid(s, _NAME) for s in linears if s.scheme.activation is None]
    if any(not grid.sym for grid in grids):
        say = "it takes symmetric experts alone"  # transformers#47430; SGLang: compressed_tensors_wNa16_moe.py
        return [Limit(say, refuses=("transformers", "SGLang"), told=False, known="source")]
    if any(s.scheme.static for s in linears):
        say = "its int8 experts take activations per token, not static scales"  # ..._moe_w8a8_int8.py
        return [Limit(say, refuses=("vLLM",), told=False, known="source")]
    return []


def _of_floats(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of small floats, and on which GPUs they are what they are."""
    pairs = dict.fromkeys((s.scheme.weight, s.scheme.activation) for s in linears)
    found = [limit for weight, inputs in pairs for limit in (*on_gpus(weight, inputs), *_unread(weight, inputs))]
    if len(pairs) > 1:
        found.append(Limit("it reads one scheme for all", refuses=("TensorRT-LLM",), told=False))
    return list(dict.fromkeys(found))


def on_gpus(weight: Grid, inputs: RangedGrid | None) -> list[Limit]:
    """Return which GPUs a runtime multiplies small floats on."""
    if isinstance(weight, Nvfp4 | Mxfp4):
        name, least = ("NVFP4", "SM 7.5") if isinstance(weight, Nvfp4) else ("MXFP4", "SM 8.0")
        say = f"{name} weights by Marlin from {least} on"
        if inputs is not None:
            say = f"{name} products on Blackwell (SM 10.0, 12.0); on older GPUs it leaves inputs unrounded ({least} on)"
    elif isinstance(weight, Mxfp8):
        say = "MXFP8 from SM 7.5 on"
    else:
        say = "FP8 products from SM 8.9 on and on AMD; on older GPUs Marlin, which leaves inputs unrounded"
        if inputs is not None and inputs.static:
            say += "; on CPUs none for static inputs"
        elif inputs is not None and isinstance(inputs.granularity, PerRow) and isinstance(weight.granularity, PerRow):
            return [Limit(f"{say}; on CPUs too", notes=("vLLM",), told=False)]
    return [Limit(say, notes=("vLLM",), told=False, known="source")]


def _unread(weight: Grid, inputs: RangedGrid | None) -> list[Limit]:
    found = []
    if not isinstance(weight, Fp8):
        say = "it decodes FP4 and MXFP8 to bfloat16: load the model with dtype=torch.bfloat16"
        found.append(Limit(say, notes=("transformers",), told=False))
    if isinstance(weight, Microscaling):
        say = "it has no linears of MXFP4 or MXFP8 in compressed-tensors"
        found.append(Limit(say, refuses=("SGLang", "TensorRT-LLM"), told=False, known="source"))
    if not isinstance(weight, Fp8):
        return found
    by = weight.granularity
    if isinstance(by, PerGroup):
        say = "runtimes read FP8 weights per tensor, channel or block, not per group"
        found.append(Limit(say, refuses=("vLLM", "SGLang", "TensorRT-LLM"), known="source"))
    if isinstance(by, PerTensor):
        say = (
            "FP8 weights with one scale a tensor are rounded once more where a runtime fuses q, k, v or gate, up: vLLM "
            "and SGLang take the largest of their scales; group=channel is as fast and keeps the codes"
        )
        found.append(Limit(say, notes=("vLLM", "SGLang"), known="source"))
    if isinstance(by, PerBlock) and inputs is not None and inputs.static:
        say = (
            "FP8 blocks take inputs that are rounded at run time, not by calibrated scales: say --inputs fp8:group=128"
        )
        found.append(Limit(say, refuses=("vLLM", "SGLang", "TensorRT-LLM"), known="source"))
    return found
