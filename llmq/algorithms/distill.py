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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        steps = self.epochs * math.ceil(len(train) / self.batch)
        point = _Point(view, [(view.scales, self.lr), (view.norms, self.norm_lr)], steps)
        if view.kept is None:
            point.judge(_mean(view, judge))
        else:
            point.put_back(*view.kept)
        for _ in range(point.epochs, self.epochs):
            for rows in train[torch.randperm(len(train), generator=point.draw)].split(self.batch):
                for row in rows.tolist():
                    with torch.enable_grad():
                        (view.loss(row) / len(rows)).backward()
                point.step()
            point.epochs += 1
            point.judge(_mean(view, judge))
            view.keep(*point.state())
        point.go_to_best()
        return {"held_kl_before": point.judged[0], "held_kl": min(point.judged)}


class _Point:
    """Where a tuning stands: the parameters and Adam's moments, how far the learning rates fell, the best point met.

    judged: the KL on the sequences to judge by, before the first epoch and after each. draw: the order of sequences.
    """

    def __init__(self, view: ModelView, groups: Sequence[tuple[Sequence[Tensor], float]], steps: int) -> None:
        self.parameters = [p for parameters, _ in groups for p in parameters]
        named = [{"params": parameters, "lr": lr} for parameters, lr in groups]
        self.optimizer = torch.optim.Adam(named, betas=(0.9, 0.95))
        self.falling = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.draw = torch.Generator().manual_seed(view.seed)
        self.best: list[Tensor] = []
        self.judged: list[float] = []
        self.epochs = 0

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.falling.step()

    def judge(self, kl: float) -> None:
        """Note a KL; where it is the least so far, the parameters are the best."""
        if not self.judged or kl < min(self.judged):
            self.best = [p.detach().clone() for p in self.parameters]
        self.judged.append(kl)

    def go_to_best(self) -> None:
        for p, value in zip(self.parameters, self.best, strict=True):
            p.data.copy_(value)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all of it as tensors and facts."""
        tensors = {"draw": self.draw.get_state()}
        for i, (p, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors |= {f"now {i}": p.detach(), f"best {i}": best}
            tensors |= {f"{name} {i}": moment for name, moment in self.optimizer.state[p].items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return tensors, {"judged": self.judged, "rates": rates, "falling": self.falling.state_dict()}

    def put_back(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Stand where `state` was asked for."""
        self.judged, self.epochs = list(facts["judged"]), len(facts["judged"]) - 1
        self.draw.set_state(tensors["draw"])
        self.falling.load_state_dict(dict(facts["falling"]))
        for group, rate in zip(self.optimizer.param_groups, facts["rates"], strict=True):
            group["lr"] = rate
        for i, p in enumerate(self.parameters):
            p.data.copy_(tensors[f"now {i}"])
            self.best.append(tensors[f"best {i}"].to(p.device))
            moments = {m: tensors[f"{m} {i}"].to(p.device) for m in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": tensors[f"step {i}"], **moments}


def _mean(view: ModelView, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float(view.loss(row)) for row in rows.tolist()) / len(rows)
