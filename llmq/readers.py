"""Which runtimes take a file that llmq writes, as rows, and what of a file some of them do not take.

    known = table(("vLLM", True, "", "ran"), ("llama.cpp", False, "it reads GGUF", "source"))
    limits = [Limit("3-bit gptq is read by GPTQModel, not by vLLM", refuses=("vLLM",))]
    readers(known, limits)      # vLLM: False, "3-bit gptq is read by ..."; llama.cpp as it is
    told(limits)                # the same line, as a warning before a run

A format knows its readers and finds the limits of a plan (formats/); docs/runtimes.md says what ran and how.
Not here: any fact about a format.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmq.errors import LlmqError


@dataclass(frozen=True)
class Runtime:
    """A runtime that is looked at: the version, what it is known to take in words for a message, how it runs `OUT`.

    instead: what to do about a format that it does not read.
    """

    version: str
    takes: str
    command: str
    instead: str


RUNTIMES = {
    "transformers": Runtime(
        "5.24",
        "gptq or awq without --lm-head, and compressed-tensors",
        'AutoModelForCausalLM.from_pretrained("OUT")',
        "it reads gptq, awq and compressed-tensors",
    ),
    "vLLM": Runtime(
        "0.32",
        "4 bits per channel or by groups of 32, 64 or 128, symmetric in gptq, either way in awq and "
        "compressed-tensors; 8 bits on GPUs; --bits 8 --act-bits 8; fp8, nvfp4, mxfp4 and mxfp8 in compressed-tensors, "
        "and --format modelopt",
        "vllm serve OUT",
        "it reads gptq, awq, compressed-tensors and modelopt",
    ),
    "SGLang": Runtime(
        "0.5",
        "4 and 8 bits per channel or by groups of 32, 64 or 128, symmetric in gptq; --bits 8 --act-bits 8; "
        "fp8 and nvfp4 in compressed-tensors",
        "python -m sglang.launch_server --model-path OUT",
        "it reads gptq, awq, compressed-tensors and modelopt",
    ),
    "llama.cpp": Runtime(
        "October 2026",
        "--format gguf",
        "llama-cli -m OUT.gguf",
        "it reads GGUF; `llmq export OUT OUT.gguf` keeps the codes where a type holds them",
    ),
    "TensorRT-LLM": Runtime(
        "commit 008e0af",
        "--format modelopt; compressed-tensors where all linears are of one scheme, of nvfp4 or fp8",
        "trtllm-serve OUT",
        "it reads modelopt, and FP8 and NVFP4 of compressed-tensors",
    ),
    "MLX": Runtime(
        "mlx-lm 0.32",
        "--format mlx, and awq",
        "mlx_lm.generate --model OUT --prompt ...",
        "`llmq export OUT NEW --to mlx` keeps the codes where it can hold them",
    ),
    "onnxruntime-genai": Runtime(
        "0.18",
        "what `llmq export OUT NEW --to onnx` writes",
        'onnxruntime_genai.Model("OUT")',
        "`llmq export OUT NEW --to onnx` makes a folder that it reads, the codes kept",
    ),
    "OpenVINO": Runtime(
        "2026.4",
        "GGUF, best of Q4_0 and Q8_0, and what `llmq export OUT NEW --to onnx:qdq` writes",
        'openvino_genai.LLMPipeline("OUT.gguf", "CPU")',
        "`llmq export OUT OUT.gguf` or `--to onnx:qdq` makes a file that it reads",
    ),
    "TensorRT": Runtime(
        "10",
        "what `llmq export OUT NEW --to onnx:qdq` writes, of 4 bits and W8A8, symmetric, scales above 0",
        "trtexec --onnx=OUT/model.onnx",
        "`llmq export OUT NEW --to onnx:qdq` makes a graph of operators that its documents take",
    ),
    "ExecuTorch": Runtime(
        "1.5",
        "what `llmq export OUT NEW --to executorch` writes, of symmetric 4 bits in groups of 32",
        'Runtime.get().load_program("OUT/model.pte")',
        "`llmq export OUT NEW --to executorch` makes a program of symmetric 4 bits, scales above 0 in bfloat16",
    ),
}
"""The runtimes that are looked at. In their texts OUT stands for the user's own path, NEW for a folder beside it."""
NAMES = ", ".join(map(str.lower, RUNTIMES))
"""All of them, in words."""
ALIASES = {
    "hf": "transformers", "huggingface": "transformers", "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp",
    "trt-llm": "TensorRT-LLM", "trtllm": "TensorRT-LLM", "tensorrtllm": "TensorRT-LLM", "mlx-lm": "MLX",
    "onnxruntime": "onnxruntime-genai", "ort": "onnxruntime-genai", "genai": "onnxruntime-genai",
    "openvino-genai": "OpenVINO", "xnnpack": "ExecuTorch",
}  # fmt: skip
"""What people call runtimes beside their names; `_` is as good as `-`, and any case."""


@dataclass(frozen=True)
class Reader:
    """Whether a runtime takes a file, and how that is known.

    accepts: None where it is not known. reason: why not, or what it takes to. known: "ran" where files of llmq of this
    format were loaded and compared, "source" where its source was read, "" of what is not known.
    """

    runtime: str
    version: str
    accepts: bool | None
    reason: str = ""
    known: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the row."""
        return asdict(self)

    def at(self, out: str) -> "Reader":
        """Return the row with the user's own path where its text says OUT."""
        return replace(self, reason=_placed(self.reason, out))

    def refusal(self, out: str = "OUT") -> str:
        """Return why it does not take the file, or is not known to, and what it takes."""
        why = self.reason or "nothing is known of this format there"
        verb = "does not take this" if self.accepts is False else "is not known to take this"
        return _placed(f"{self.runtime} {self.version} {verb}: {why}. It takes {RUNTIMES[self.runtime].takes}", out)

    def command(self, out: str) -> str:
        """Return how a file that it takes is run."""
        return RUNTIMES[self.runtime].command.replace("OUT.gguf" if out.endswith(".gguf") else "OUT", out)

    def use(self, out: str) -> str:
        """Return how a file that it takes is run, and to what it takes it."""
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.runtime} {self.version} takes it{why}: {self.command(out)}"


@dataclass(frozen=True)
class Limit:
    """Something of a file that some runtimes do not take, or take in part.

    text: what, in one line. refuses: those that do not load it, or compute rubbish from it. notes: those that take it
    with what the line says. told: whether the user is warned before a run; else the plan alone says it.
    known: how it is known where that differs from the format as a whole.
    """

    text: str
    refuses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    told: bool = True
    known: str = ""


def table(*rows: tuple[str, bool | None, str, str]) -> tuple[Reader, ...]:
    """Return a reader for each runtime from (name, accepts, reason, known); those not named do not take the format."""
    said = {name: (accepts, why, known) for name, accepts, why, known in rows}
    return tuple(Reader(n, r.version, *said.get(n, (False, r.instead, "source"))) for n, r in RUNTIMES.items())


def readers(known: Iterable[Reader], limits: Sequence[Limit]) -> list[Reader]:
    """Return the rows of a plan: what is known of the format, with the limits that its linears meet."""
    return [_limited(row, limits) for row in known]


def _limited(row: Reader, limits: Sequence[Limit]) -> Reader:
    if row.accepts is False:
        return row
    refusing = [limit for limit in limits if row.runtime in limit.refuses]
    met = refusing or [limit for limit in limits if row.runtime in limit.notes]
    if not met:
        return row
    texts = [*([] if refusing or not row.reason else [row.reason]), *(limit.text for limit in met)]
    how = next((limit.known for limit in met if limit.known), row.known)
    return replace(row, accepts=False if refusing else row.accepts, reason="; ".join(texts), known=how)


def told(limits: Iterable[Limit]) -> list[str]:
    """Return the lines that a user is warned with before a run."""
    return [limit.text for limit in limits if limit.told]


def runtime(name: str, option: str = "--for") -> str:
    """Return the runtime that a name or an alias means, in any case. Raises LlmqError, with all names, for another."""
    said = name.strip().lower().replace("_", "-")
    found = ALIASES.get(said) or next((known for known in RUNTIMES if known.lower() == said), None)
    if found is None:
        raise LlmqError(f"{option} {name!r}: no such runtime is known (there are: {NAMES})")
    return found


def row(rows: Iterable[Reader], name: str, option: str = "--for") -> Reader:
    """Return what is known of the runtime of that name. option: of the command line. Raises LlmqError as `runtime`."""
    wanted = runtime(name, option)
    return next((r for r in rows if r.runtime == wanted), Reader(wanted, RUNTIMES[wanted].version, None))


def require(rows: Iterable[Reader], name: str, out: str = "OUT") -> None:
    """Raise LlmqError, saying what it would take, where the runtime of that name does not take the file, or may not.

    out: what will be written, as the user calls it.
    """
    found = row(rows, name)
    if not found.accepts:
        raise LlmqError(found.refusal(out))


def _placed(text: str, out: str) -> str:
    """Return a text about OUT, OUT.gguf and a NEW folder beside them with the paths of a user."""
    stem = out.removesuffix("/").removesuffix(".gguf")
    text = re.sub(r"\bOUT NEW --to ([a-z]+)", lambda m: f"OUT {stem}-{m[1]} --to {m[1]}", text)
    return re.sub(r"\bOUT(\.gguf)?\b", lambda m: f"{stem}.gguf" if m[1] else out, text)
