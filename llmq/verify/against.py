"""What a checkpoint was made from, beside it: the recorded transforms repeated, every weight compared with its source.

    packed     |Q - W|^2 / |W|^2 must be the recorded weight_error, to 1e-5 of it
    float      must be W, rounded to the dtype that it is stored in; but for what a finisher tuned, which is recorded

W is the source's weight in the basis and with the folds that are recorded. Without a record both are told, not judged;
so they are of a dequantized checkpoint beside the float one from which the quantized one was made.
Not here: rotations and folds themselves (model/rotated.py, model/folding.py).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from llmq.errors import printable
from llmq.guard.reading import number
from llmq.model.folding import floats_of
from llmq.model.skeleton import Skeleton
from llmq.verify.report import Report

_AGREE = 1e-5  # relative difference of two measurements of one error
_NOTHING = 1e-12  # an error that is none: what float32 makes of a weight that a grid holds exactly


class Truth:
    """The checkpoint that another was made from, after what is recorded to have been done to its floats.

    skeleton: of the source as it is, for a forward beside. packed: the linears of the other that are packed. shifted:
    those that it stores as another float, such as 1 + weight, in whose last bit a small weight is lost. plain:
    whether the other is the language model alone, whatever the source is.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        record: dict[str, Any],
        packed: Collection[str],
        shifted: Collection[str] = (),
        *,
        plain: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self._decoder = skeleton.name_of(skeleton.model.get_decoder()) if plain else "model"
        self.packed, self.shifted = {self._named(n) for n in packed}, {self._named(n) for n in shifted}
        self._between = "linears" not in record and bool(record.get("decoded")) and not skeleton.source.decoded
        self._judged = any(key in record for key in ("transforms", "exported", "decoded")) and not self._between
        self._lines = record.get("linears", {})
        self._tuned = set(record.get("tuned", ()))
        self._errors: dict[str, float] = {}
        self._differ: list[str] = []
        self._source = floats_of(skeleton.source, record, self.packed, "the record")
        self._head, self._embedding = (
            f"{skeleton.name_of(m)}.weight"
            for m in (skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings())
        )

    def check(self, name: str, tensor: Tensor, report: Report) -> None:
        """Compare a decoded weight, or a float tensor in the dtype that it is stored in, with its source."""
        name = self._named(name)
        module = name.removesuffix(".weight")
        W = self._weight(name)
        if W.shape != tensor.shape:
            report.fail(f"{name} is {list(tensor.shape)}, its source {list(W.shape)}")
        elif module in self.packed and module != name:
            self._check_packed(module, tensor, W.float(), report)
        elif name not in self._tuned:
            report.count("floats compared with the source")
            if not _close(tensor, W.to(tensor.dtype), around=float(name in self.shifted)):
                self._differ.append(name)
                if self._between:
                    self._errors[name] = error_of(tensor.float(), W.float())

    def _named(self, name: str) -> str:
        """Return the source's name of a tensor or module."""
        return f"{self._decoder}{name.removeprefix('model')}" if name.startswith("model.") else name

    def conclude(self, report: Report) -> None:
        """Report what was found over all weights."""
        for name in self._differ if self._judged else ():
            report.fail(f"{name} is neither the source's nor what the recorded transforms make of it")
        if self._differ and not self._judged:
            why = "quantized in between" if self._between else "scaled, perhaps"
            report.note(f"{len(self._differ)} float tensors are not the source's, e.g. {self._differ[0]}: {why}")
        if self._tuned:
            report.note(
                f"{len(self._tuned)} float tensors were tuned after rounding, as recorded, and are not compared"
            )
        if self._errors:
            worst = max(self._errors, key=lambda n: self._errors[n])
            mean = sum(self._errors.values()) / len(self._errors)
            report.figures |= {"weight_error": mean, "worst_weight_error": self._errors[worst]}
            report.note(
                f"squared relative error of the weights: {mean:.3e} on average, {self._errors[worst]:.3e} in {worst}"
            )

    def _check_packed(self, name: str, Q_NK: Tensor, W_NK: Tensor, report: Report) -> None:
        report.count("errors measured again")
        self._errors[name] = error = error_of(Q_NK, W_NK)
        line = self._lines.get(name)
        recorded = line.get("weight_error") if isinstance(line, dict) else None
        if recorded is None or not self._judged:
            return
        said = number(recorded)
        if said is None:
            report.fail(f"{name}: the recorded weight_error is {printable(repr(recorded), 40)}, which is no number")
            return
        same = abs(error - said) <= max(_AGREE * abs(said), _NOTHING)
        report.expect(same, f"{name}: weight_error is {error:.6e}, recorded is {said:.6e}: not made from this source")

    def _weight(self, name: str) -> Tensor:
        tied = name == self._head and name not in self._source.source
        return self._source.get(self._embedding if tied else name)


def error_of(Q: Tensor, W: Tensor) -> float:
    """Return |Q - W|^2 / |W|^2."""
    return _square_sum(Q - W) / max(_square_sum(W), 1e-30)


def _square_sum(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()


def _close(a: Tensor, b: Tensor, around: float) -> bool:
    """Return whether two tensors of one dtype are equal but for the last bit of folded values, or of `around`."""
    if torch.equal(a, b):
        return True
    eps, tiny = torch.finfo(a.dtype).eps, torch.finfo(a.dtype).tiny
    return bool(torch.isclose(a.float(), b.float(), rtol=eps, atol=max(tiny, eps * around)).all())
