"""A checkpoint folder (GPTQ, AWQ, compressed-tensors; ours or a peer's): its tensors against its config.

Every linear must be stored as the config says, every tensor of the architecture must be there in its shape, and
nothing may lie beside a linear that its reader does not take.
Not here: GGUF (ggml.py), the walk through the blocks (forward.py), which tensor is which (checkpoint/names.py).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import Source
from llmq.model.skeleton import Skeleton
from llmq.verify import record
from llmq.verify.floats import Floats
from llmq.verify.forward import Decoded
from llmq.verify.linears import check_float, check_scale, read_floats, read_linear
from llmq.verify.mlx import Affine
from llmq.verify.packing import PACKED, How, Packing, cache_scales, embeddings, packing
from llmq.verify.report import Report


class Folder:
    """A checkpoint folder as the tensors of a transformers model, decoded as they are read.

    recorded: the linears' lines of quantization.json. packed: how each packed linear is stored.
    Raises LlmqError for a config that says what is not decoded here, and where it is not that of the tensors.
    """

    def __init__(self, source: Source, recorded: Mapping[str, Any], report: Report) -> None:
        self.source, self.recorded = source, recorded
        self.skeleton = Skeleton(source, torch.float32)
        model, config = self.skeleton.model, source.quantization
        self._headers = source.headers()
        self._shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self._linears = {n: (m.weight.shape[0], m.weight.shape[1]) for n, m in (linears | tables).items()}
        if self.skeleton.config.tie_word_embeddings:
            head = self.skeleton.name_of(model.get_output_embeddings())
            del self._shapes[f"{head}.weight"], self._linears[head]
        self.skeleton.source = Decoded(source, self.names(), self.read)
        self._cache = cache_scales(config or {})
        self._by_tensors = (config or {}).get("quant_method") == "mlx"  # whose readers pack what has scales
        self.packed = self._find_packed(_how(config or {}, tables), report)
        self._check_leftovers(report)
        for warning in source.warnings:
            report.note(warning)

    def names(self) -> list[str]:
        """Return the tensors that the model wants."""
        return list(self._shapes)

    def read(self, name: str, report: Report) -> Tensor | None:
        """Return a tensor of the model, decoded and checked; None where that cannot be."""
        module = name.removesuffix(".weight")
        if module not in self.packed or module == name:
            return self._float(name, report)
        how, shape = self.packed[module], self._linears[module]
        if not isinstance(how, Packing):
            return self._floats(module, how, report)
        linear = read_linear(self.source, self._headers, module, how, shape, report)
        if linear is None:
            return None
        record.check_linear(linear, self.recorded, report)
        return torch.from_numpy(linear.weight.values())

    def _floats(self, module: str, how: Floats | Affine, report: Report) -> Tensor | None:
        found = read_floats(self.source, self._headers, module, how, self._linears[module], report)
        if found is None:
            return None
        values, solved = found
        record.check_floats(module, solved, self.recorded, report)
        return torch.from_numpy(values)

    def check_cache(self, report: Report) -> None:
        """Check the scales of a quantized key-value cache."""
        for name in self.source.names():
            if name.endswith(self._cache) and "zero" not in name:
                check_scale(name, self.source.get(name), report)

    def _float(self, name: str, report: Report) -> Tensor | None:
        if not report.expect(name in self._headers, f"tensor {name} is missing"):
            return None
        shape, wanted = tuple(self._headers[name][1]), self._shapes[name]
        if not report.expect(shape == wanted, f"{name} is {list(shape)}, not {list(wanted)}"):
            return None
        tensor = self.source.get(name)
        return tensor if check_float(name, tensor, report) else None

    def _find_packed(self, how: Callable[[str], How | None], report: Report) -> dict[str, How]:
        """Return how each packed linear is stored; report where config and tensors disagree on it.

        A peer's config need not list what was left float: there the tensors decide.
        """
        present = {n.rpartition(".")[0] for n in self._headers if n.rpartition(".")[2] in PACKED}
        found: dict[str, How] = {}
        for name in self._linears:
            said: How | None = how(name) or how(self.source.written(name))
            if said and name in present:
                found[name] = said
            elif name in present:
                report.fail(f"{name}: the file holds it packed, but the config leaves it float")
            elif name in self.recorded or (said and f"{name}.weight" not in self._headers):
                report.fail(f"{name} was quantized, but the file holds no packed tensors of it")
            elif said and not self._by_tensors:
                report.note(f"{name}: the config says {said}, but the file holds it float; not all readers take that")
        return found

    def _check_leftovers(self, report: Report) -> None:
        """Report tensors that nothing reads, module by module."""
        read = {f"{m}.{local}" for m, how in self.packed.items() for local in how.tensors(1, 1)}
        read |= self._shapes.keys() - {f"{m}.weight" for m in self.packed} | self.source.unread
        left: dict[str, list[str]] = {}
        for name in self._headers.keys() - read:
            module, _, local = name.rpartition(".")
            if local not in self._cache:
                left.setdefault(module, []).append(local)
        for module, locals_ in sorted(left.items()):
            report.fail(f"nothing reads {module}: {', '.join(sorted(locals_))}")


def _how(config: Mapping[str, Any], tables: Collection[str]) -> Callable[[str], How | None]:
    """Return what says how a module is stored, None of those that are float. tables: the embeddings."""
    if not config:
        return lambda name: None
    linear, table = packing(config), embeddings(config)
    return lambda name: (table if name in tables else linear)(name)
