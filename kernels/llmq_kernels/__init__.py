"""Triton kernels for quantized Llama-family models, each beside its reference. Imports torch and triton only.

    weight_only.linear(x, layout.pack(codes, scale, zero, bits), bias)     W2, W3, W4, W8 with fp16 or bf16 activations
    grouped.linear(x, grouped.stack(weights)[0], routing.plan(index, E))   all experts of a layer
    grouped_int8.linear(x, grouped_int8.stack(weights)[0], plan, static)   those of W8A8, FP8
    e2m1.linear(x, e2m1.pack(codes, scales, e8m0=False), bias)             NVFP4, MXFP4 with fp16 or bf16 activations
    int8.linear(x, int8.pack(codes, scale), static, bias)                  W8A8
    fp8.linear(x, fp8.pack(codes, scale), static, bias)                    FP8 weights and activations
    kv.append(cache, k, v, lengths); attention.attend(q, cache, lengths)   the int8 or int4 key-value cache
    panel.round_panel(...); panel.walk_panel(...)                          columns rounded in order: GPTQ, descent

Every op is torch's own, with a fake implementation, so that torch.compile traces through it. CPU tensors go to the
reference, which is exact and slow; other devices to the kernel. Nothing is asked of a device at import.

dequant.py    codes to floats in registers        layout.py    what the weight-only kernel reads
routing.py    tokens sorted by expert             grouped.py    the product of a layer's experts
decode.py     codes to floats in memory           dense.py     many tokens: panels decoded, the library multiplies
rounding.py   the nearest integer, or E4M3
aot.py, facts.py, cases.py    compile for GPUs that are not here, and check what the machine code shows
tune.py       which configuration is fastest      launch.py, errors.py
"""

from llmq_kernels import attention, e2m1, fp8, grouped, grouped_int8, int8, kv, layout, panel, routing, weight_only
from llmq_kernels.errors import KernelError

__all__ = [
    "KernelError",
    "attention",
    "e2m1",
    "fp8",
    "grouped",
    "grouped_int8",
    "int8",
    "kv",
    "layout",
    "panel",
    "routing",
    "weight_only",
]
