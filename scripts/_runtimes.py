"""One runtime, in a process of its own: how fast it is on one thread, and what it makes of a text.

    python scripts/_runtimes.py NAME PATH IDS.json OUT.npz

NAME is a class below, PATH what it loads. IDS has "text", of which every next token's log-probabilities are taken, and
"prompt", of which the speed is. OUT gets `log_probabilities` [T, V] and `seconds` [2]: CPU seconds of the prompt, and
of `DECODED` tokens behind it. Each class imports its runtime itself, so that any Python that has that one will do.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DECODED = 48


class Runtime(ABC):
    """A loaded model."""

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @abstractmethod
    def logits(self, ids: list[int]) -> np.ndarray:
        """Return logits, or log-probabilities, of the token behind each of `ids`, `[T, V]`."""

    @abstractmethod
    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """Return the CPU seconds of a prompt and its first token, and of `n` further tokens."""


class Llmq(Runtime):
    """llmq.load in the dtype of the checkpoint, its own kernels."""

    def __init__(self, path: Path, **how: Any) -> None:
        import torch

        import llmq

        torch.set_num_threads(1)
        self._torch, self._model = torch, llmq.load(path, **how)

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `Runtime`."""
        with self._torch.no_grad():
            return self._model(self._torch.tensor([ids])).logits[0].float().numpy()

    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """See `Runtime`."""
        with self._torch.no_grad():
            first, made = _timed(lambda: self._model(self._torch.tensor([ids]), use_cache=True, logits_to_keep=1))
            return first, _timed(lambda: self._go_on(made, n))[0]

    def _go_on(self, made: Any, n: int) -> None:
        for _ in range(n):
            following = made.logits[:, -1:].argmax(-1)
            made = self._model(following, past_key_values=made.past_key_values, use_cache=True)


class LlmqFloat32(Llmq):
    """The same in float32."""

    def __init__(self, path: Path) -> None:
        import torch

        super().__init__(path, dtype=torch.float32)


class Reference(Llmq):
    """llmq's reference decode in float32, what the others are held against."""

    def __init__(self, path: Path) -> None:
        import torch

        super().__init__(path, dtype=torch.float32, backend="reference")

    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """Measure nothing."""
        return 0.0, 0.0


class OnnxGenai(Runtime):
    """onnxruntime-genai; logits by onnxruntime of the same file."""

    def __init__(self, path: Path) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
        self._genai, self._model, self._path = onnxruntime_genai, onnxruntime_genai.Model(config), path

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `Runtime`."""
        import torch
        from _onnxruntime import OnnxModel

        return OnnxModel(self._path)(torch.tensor([ids]))[0][0].numpy()

    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """See `Runtime`."""
        settings = self._genai.GeneratorParams(self._model)
        length = len(ids) + n + 1
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, settings)

        def begin() -> None:
            generator.append_tokens(np.array([ids], np.int32))
            generator.generate_next_token()

        def go_on() -> None:
            for _ in range(n):
                generator.generate_next_token()

        return _timed(begin)[0], _timed(go_on)[0]


class LlamaCpp(Runtime):
    """llama.cpp, by the wheel of xllamacpp; a prompt that it has seen is not computed again."""

    def __init__(self, path: Path) -> None:
        import _llama_cpp

        self._model = _llama_cpp.LlamaCpp(path, 256)

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `Runtime`."""
        rows = [self._model.log_probabilities(ids[: i + 1], 10**6) for i in range(len(ids))]
        return np.array([[row[i] for i in range(len(row))] for row in rows])

    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """See `Runtime`."""
        first, _ = _timed(lambda: self._model.generate(ids, 1))
        return first, _timed(lambda: self._model.generate(ids, n))[0]


class OpenVino(Runtime):
    """openvino-genai: a folder of scripts/_openvino.py, or a GGUF file; logits of its graph by openvino."""

    def __init__(self, path: Path) -> None:
        import openvino_genai

        own = {} if path.suffix == ".gguf" else {"ATTENTION_BACKEND": "SDPA"}
        saved = {"enable_save_ov_model": True} if path.suffix == ".gguf" else {}
        self._genai = openvino_genai
        self._model = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=1, **own, **saved)
        self._graph = (path.parent if path.is_file() else path) / "openvino_model.xml"

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `Runtime`."""
        import openvino

        compiled = openvino.Core().compile_model(self._graph, "CPU", {"INFERENCE_NUM_THREADS": 1})
        n = len(ids)
        known = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, n), np.int64),
            "position_ids": np.arange(n)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        wanted = {i.get_any_name() for i in compiled.inputs}
        found = compiled.create_infer_request().infer({k: v for k, v in known.items() if k in wanted})
        return found[compiled.output("logits")][0]

    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """See `Runtime`; a prompt is computed both times."""
        first, _ = _timed(lambda: self._generate(ids, 1))
        return first, _timed(lambda: self._generate(ids, n + 1))[0] - first

    def _generate(self, ids: list[int], n: int) -> None:
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = n, False, True
        self._model.generate(openvino.Tensor(np.array([ids])), config)


class Mlx(Runtime):
    """mlx-lm, on the CPU."""

    def __init__(self, path: Path) -> None:
        import mlx.core
        import mlx_lm
        from mlx_lm.models.cache import make_prompt_cache

        mlx.core.set_default_device(mlx.core.cpu)
        self._mx, self._new_cache = mlx.core, make_prompt_cache
        self._model, _ = mlx_lm.load(str(path))

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `Runtime`."""
        return np.array(self._model(self._mx.array([ids]))[0].astype(self._mx.float32))

    def seconds(self, ids: list[int], n: int) -> tuple[float, float]:
        """See `Runtime`."""
        cache = self._new_cache(self._model)

        def go_on(tokens: list[int], n: int) -> list[int]:
            for _ in range(n):
                logits = self._model(self._mx.array([tokens]), cache=cache)[0, -1]
                tokens = [self._mx.argmax(logits).item()]
            return tokens

        first, following = _timed(lambda: go_on(ids, 1))
        return first, _timed(lambda: go_on(following, n))[0]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    high = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return high - np.log(np.exp(high).sum(-1, keepdims=True))


def main() -> None:
    """Load, look at the text, warm up, measure."""
    name, path, asked, out = sys.argv[1:]
    ids = json.loads(Path(asked).read_text())
    model: Runtime = globals()[name](Path(path))
    found = _log_softmax(model.logits(ids["text"]))
    model.seconds(ids["prompt"][::-1][:16], 2)
    np.savez(out, log_probabilities=found, seconds=model.seconds(ids["prompt"], DECODED))


if __name__ == "__main__":
    main()
