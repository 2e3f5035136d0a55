"""Schemes by name: what people call a pair of weights and inputs, as the options of a recipe that it is short for.

    SCHEMES["nvfp4"].options     {"weights": "nvfp4", "inputs": "nvfp4"}

Method, calibration, skips and all else that a recipe says stand beside it.
Facts of hardware: the runtimes' sources and releases of November 2026 (docs/floats.md).
Not here: what an option means (recipe.py), which runtimes take a file that is planned (formats/).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.errors import LlmqError

FLOAT = "float"
"""What choices call a linear that is not quantized."""
MLP = r"\.(mlp|feed_forward|ffn|block_sparse_moe)\."


@dataclass(frozen=True)
class Named:
    """A scheme.

    bits: of a weight, scales counted. runs: which hardware multiplies it, in which runtimes. beware: when not to.
    """

    options: Mapping[str, Any]
    bits: str
    runs: str
    beware: str

    @property
    def changes(self) -> str:
        """What an override says to change a linear to it."""
        given = {"weights": f"int:bits={self.options.get('bits')}", "inputs": "none"} | dict(self.options)
        if "act_bits" in given:
            given |= {"weights": "int:bits=8:group=channel:restricted=true", "inputs": "int:bits=8:group=channel"}
        return f"weights={given['weights']},inputs={given['inputs']}"


_FP8 = "Ada, Hopper, Blackwell, AMD{0}: vLLM, SGLang; Ampere by the weights alone"
_SMALL = (
    "under 10B parameters take {0}: a 7B lost 10 points of instruction following with its inputs in 4 bits, 4 without "
    "(llm-compressor's PR 3025)"
)
SCHEMES: Mapping[str, Named] = {
    "w4a16": Named({"bits": 4}, "4.13", "every GPU, CPUs with AVX-512: vLLM, SGLang, transformers", ""),
    "w8a8": Named(
        {"bits": 8, "act_bits": 8}, "8.0", "NVIDIA from Ampere on, CPUs with VNNI or AMX, Arm: vLLM",
        "fp8 is closer where a GPU has it",
    ),
    "fp8": Named(
        {"weights": "fp8", "inputs": "fp8"}, "8.0", _FP8.format(", CPUs"),
        "vLLM can round a float model to it while loading, nearly as close",
    ),
    "fp8-block": Named(
        {"weights": "fp8:group=128x128", "inputs": "fp8:group=128"}, "8.0", _FP8.format(", CPUs"),
        "128 has to divide the input features; fp8 is as close",
    ),
    "fp8-static": Named(
        {"weights": "fp8", "inputs": "fp8:group=tensor"}, "8.0", f"{_FP8.format('')}; TensorRT-LLM",
        "inputs larger than calibration saw are clipped",
    ),
    "nvfp4": Named(
        {"weights": "nvfp4", "inputs": "nvfp4"}, "4.5",
        "Blackwell: vLLM, SGLang, TensorRT-LLM; older GPUs by the weights alone", _SMALL.format("nvfp4a16"),
    ),
    "nvfp4a16": Named({"weights": "nvfp4"}, "4.5", "NVIDIA from Turing on: vLLM, SGLang; CPUs: llmq", ""),
    "mxfp4": Named(
        {"weights": "mxfp4", "inputs": "mxfp4"}, "4.25", "Blackwell: vLLM; from Ampere on by the weights alone",
        _SMALL.format("mxfp4a16"),
    ),
    "mxfp4a16": Named(
        {"weights": "mxfp4"}, "4.25", "NVIDIA from Ampere on: vLLM; CPUs: llmq", "nvfp4a16 errs less for 0.25 bits more"
    ),
    "mxfp8": Named(
        {"weights": "mxfp8", "inputs": "mxfp8"}, "8.25", "NVIDIA from Turing on: vLLM; CPUs: llmq",
        "fp8 is smaller and read by more",
    ),
    "mixed": Named(
        {"weights": "fp8", "inputs": "fp8", "lm_head": True, "override": (f"{MLP}:weights=nvfp4,inputs=nvfp4",)},
        "5 to 6", "Blackwell: vLLM, SGLang",
        "MLPs in nvfp4, attention and head in fp8, routers float; a tied head is written a second time",
    ),
}  # fmt: skip


GGML = "Q3_K,Q4_K,Q5_K,Q6_K,Q8_0"
"""The types of ggml that a budget chooses from where nothing is said."""


def bits_of(words: str) -> tuple[str, ...]:
    """Return what overrides say for the bits that a budget chooses from, such as 3,4,8. Raises LlmqError for others."""
    bits = {w.strip() for w in words.split(",")}
    if not bits <= set("2345678"):
        raise LlmqError(f"bit_choices is a list of bits from 2 to 8, such as 3,4,8, not {words!r}")
    return tuple(f"bits={w}" for w in sorted(bits))


def type_of(word: str) -> str:
    """Return what an override says for a type of ggml that a budget chooses from."""
    return f"type={word.upper()}"


def changes_of(word: str) -> str:
    """Return what an override says for one that a budget chooses from: a scheme, a grid or FLOAT. Raises LlmqError."""
    if word == FLOAT:
        return FLOAT
    if word == "mixed" or not word:
        raise LlmqError(f"choices are schemes (`llmq list schemes`, but mixed), grids or {FLOAT}, not {word!r}")
    return SCHEMES[word].changes if word in SCHEMES else f"weights={word},inputs=none"
