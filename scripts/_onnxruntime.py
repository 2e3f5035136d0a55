"""An ONNX folder of llmq running in onnxruntime, on one thread, with the options that keep its arithmetic what it says.

session.x64quantprecision                    1: sums of W8A8 do not overflow on CPUs without VNNI
session.qdq_matmulnbits_accuracy_level       0: inputs of a plain 4-bit DequantizeLinear and MatMul stay floats
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXACT = {"session.x64quantprecision": "1", "session.qdq_matmulnbits_accuracy_level": "0"}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxModel:
    """A loaded graph. options: of the session, by their names."""

    def __init__(self, folder: Path, options: Mapping[str, str] = EXACT) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        for key, value in options.items():
            settings.add_session_config_entry(key, value)
        file = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, ids: Tensor, mask: Tensor | None = None, past: Any = None) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits of `ids` `[B, S]`, float32, and what is to be handed in as `past` next.

        mask: `[B, T]` of all tokens so far, 0 for padding.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        known = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        feeds = {i.name: known[i.name] if i.name in known else self._past(i, len(ids), past) for i in self._inputs()}
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        logits = torch.from_numpy(found.pop("logits").astype(np.float32))
        return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}

    def by_steps(self, ids: Tensor) -> Tensor:
        """Return the logits of `ids` `[1, S]`, each token alone, through the cache."""
        past, rows = None, []
        for t in range(ids.shape[1]):
            logits, past = self(ids[:, t : t + 1], torch.ones_like(ids[:, : t + 1]), past)
            rows.append(logits)
        return torch.cat(rows, 1)

    def _inputs(self) -> list[Any]:
        return list(self._session.get_inputs())

    def _past(self, wanted: Any, batch: int, past: Any) -> Any:
        if past is not None:
            return past[wanted.name]
        _, heads, _, d = wanted.shape
        return np.zeros((batch, heads, 0, d), _DTYPES[wanted.type])
