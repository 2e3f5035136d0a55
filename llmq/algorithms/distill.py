"""Distill: tune group scales and norm gains of the whole quantized model by the KL to the float model's predictions.

min mean_t KL(p_t || q_t) over the calibration tokens, by Adam, the learning rate falling along half a cosine; codes and
zeros stay. After each epoch the KL is measured on sequences that are never trained on, and the best point is kept, the
start among them.
What EfficientQAT calls end-to-end training of quantization parameters (Chen et al. 2024, arXiv:2407.11062, section
3.3), here against the float model's predictions in place of the text, and with the norms. It pays at 2 and 3 bits, a
step for each sequence (docs/accuracy.md), and needs the float and the decoded model in memory at once.
Not here: the model and its gradients (whole_model.py).
"""

import math
from dataclasses import dataclass

import torch

from llmq.steps import Finisher, ModelView
from llmq.types import LlmqError


@dataclass(frozen=True)
class Distill(Finisher):
    """End-to-end tuning.

    epochs: passes over the calibration. batch: sequences a step.
    lr: first step of a scale, relative to it. norm_lr: first step of a norm's gain.
    """

    epochs: int = 2
    batch: int = 1
    lr: float = 8e-4
    norm_lr: float = 8e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError("epochs and batch are at least 1")

    def forwards(self, samples: int, length: int) -> float:
        """Return the epochs, whose blocks run forward twice and backward, and the looks at the held-out eighth."""
        return 4 * self.epochs * 7 / 8 + (1 + self.epochs) / 8

    def finish(self, view: ModelView) -> dict[str, float]:
        """Tune the view's parameters in place. Returns the KL on the held-out sequences, before and after."""
        held = max(1, view.rows // 8)
        if view.rows < 2:
            raise LlmqError("distill judges by sequences that it does not train on; give at least 2 --samples")
        train, judge = torch.arange(view.rows - held), torch.arange(view.rows - held, view.rows)
        groups = [{"params": view.scales, "lr": self.lr}, {"params": view.norms, "lr": self.norm_lr}]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        steps = self.epochs * math.ceil(len(train) / self.batch)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        draw = torch.Generator().manual_seed(view.seed)
        everything = [*view.scales, *view.norms]
        before = best = _mean(view, judge)
        kept = [p.detach().clone() for p in everything]
        for _ in range(self.epochs):
            for rows in train[torch.randperm(len(train), generator=draw)].split(self.batch):
                for row in rows.tolist():
                    with torch.enable_grad():
                        (view.loss(row) / len(rows)).backward()
                optimizer.step()
                optimizer.zero_grad()
                falling.step()
            now = _mean(view, judge)
            if now < best:
                best, kept = now, [p.detach().clone() for p in everything]
        for p, value in zip(everything, kept, strict=True):
            p.data.copy_(value)
        return {"held_kl_before": before, "held_kl": best}


def _mean(view: ModelView, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float(view.loss(row)) for row in rows.tolist()) / len(rows)
