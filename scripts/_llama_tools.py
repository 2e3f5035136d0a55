"""llama.cpp's own command-line tools: an importance matrix from a text, and files quantized with it.

The tools are built from the sdist of llama-cpp-python: `cmake --build . --target llama-quantize llama-imatrix`.
Not here: llama.cpp as a library that runs a file (_llama_cpp.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import _measure as measure

CONTEXT = 512


@dataclass(frozen=True)
class LlamaTools:
    """A folder of tools, and what they read: the F16 file that llmq writes of a model, a calibration text.

    chunks: windows of CONTEXT tokens that llama-imatrix reads. room: where F16 file and matrix stay; made only once.
    """

    bin: Path
    model: Path
    calib: Path
    room: Path
    chunks: int = 128
    threads: int = 1

    def f16(self) -> Path:
        """Return the file that is quantized."""
        file = self.room / "f16.gguf"
        if not file.exists():
            measure.llmq("quantize", self.model, file, "--type", "F16", "--method", "rtn")
        return file

    def imatrix(self) -> Path:
        """Return llama-imatrix's file."""
        file = self.room / "imatrix.gguf"
        if not file.exists():
            options = ("-f", self.calib, "-c", CONTEXT, "--chunks", self.chunks, "-t", self.threads)
            measure.run(self.bin / "llama-imatrix", "-m", self.f16(), "-o", file, *options)
        return file

    def quantize(self, kind: str, out: Path, *options: object) -> measure.Measured:
        """Write a file of a type, such as Q4_K_M; return what that took, F16 file and matrix left out."""
        return measure.run(self.bin / "llama-quantize", *options, self.f16(), out, kind, self.threads)
