"""Make tests/golden/ggml.safetensors: seeded weights and the bytes that llama.cpp itself makes of them.

    python scripts/make_golden_ggml.py path/to/libggml-base.so    (or xllamacpp.abi3.so of the wheel)

`ggml_quantize_chunk` is called through ctypes, once without and, where the type uses one, once with an importance
matrix. tests/golden/README.md says how to build the library. Weights are exact in float16, so that they are kept so.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.gguf.kinds import KINDS

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q2_0",
         "MXFP4", "NVFP4")  # fmt: skip
UNWEIGHTED = ("Q8_0", "Q2_0", "MXFP4", "NVFP4")  # llama.cpp ignores the importance matrix
GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/ggml.safetensors"


class Ggml:
    """The quantizer of a libggml-base."""

    def __init__(self, library: str) -> None:
        self._call = ctypes.CDLL(library).ggml_quantize_chunk
        self._call.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._call.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def quantize(self, kind: str, W_NK: Tensor, importance_K: Tensor | None = None) -> Tensor:
        """Return the stored rows of float32 weights, uint8 `[N, row_bytes]`."""
        _, number, columns, size = KINDS[kind]
        N, K = W_NK.shape
        W_NK = W_NK.float().contiguous()
        weights = None if importance_K is None else importance_K.float().contiguous()
        rows = torch.zeros(N, K // columns * size, dtype=torch.uint8)
        pointer = None if weights is None else weights.data_ptr()
        written = self._call(number, W_NK.data_ptr(), rows.data_ptr(), 0, N, K, pointer)
        if written != rows.numel():
            raise RuntimeError(f"{kind}: ggml wrote {written} bytes, not {rows.numel()}")
        return rows


def weights(N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return weights of a trained model's kind, exact in float16, and an importance for every column.

    A third of the rows is normal, a third has heavy tails, a third has columns of different scale.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, N // 3, K, generator=generator)
    heavy = normal[1] / torch.rand(N // 3, K, generator=generator).mul_(0.9).add_(0.1)
    columns = normal[2] * torch.exp(0.5 * torch.randn(K, generator=generator))
    importance = torch.exp(1.5 * torch.randn(K, generator=generator))
    return (0.02 * torch.cat([normal[0], heavy, columns])).half(), importance


def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libggml-base.so, or .dylib or .dll")
    ggml = Ggml(parser.parse_args().library)
    W_NK, importance = weights(24, 512, seed=11)
    tensors = {"weights": W_NK, "importance": importance}
    for kind in TYPES:
        tensors[kind] = ggml.quantize(kind, W_NK)
        if kind not in UNWEIGHTED:
            tensors[f"{kind}.weighted"] = ggml.quantize(kind, W_NK, importance)
    save_file(tensors, GOLDEN)
    print(f"wrote {GOLDEN.name}: {GOLDEN.stat().st_size / 1e3:.0f} kB, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
