"""Which runtimes read a checkpoint that lies there, ours or a peer's, by the rules of each: from config and headers.

    for row in readers_of("./my-llama-int4"): ...       Reader("vLLM", "0.32", True, ...), ...

The rules are those by which a run is planned (readers.py, formats/): bits, groups, symmetry, parts that runtimes fuse,
what is left float, scales of activations and of the cache, experts that lie apart.
Not here: whether the tensors are right (verify/).
"""

from pathlib import Path

from torch import nn

from llmq import registry
from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import decoded_on_load
from llmq.checkpoint.names import match
from llmq.checkpoint.packed import PackedCheckpoint, PackedWeights
from llmq.checkpoint.place import EXPORTED, is_gguf, user_path
from llmq.errors import LlmqError, printable
from llmq.format import Format
from llmq.gguf import kinds
from llmq.gguf.reader import GgufFile
from llmq.guard.reading import field, json_object
from llmq.model.experts import apart
from llmq.model.pretrained import blank_model, model_config, transformers_model
from llmq.readers import RUNTIMES, Limit, Reader, readers, table
from llmq.types import LinearSpec, Scheme


def _only(what: str, *rows: tuple[str, bool | None, str, str]) -> tuple[Reader, ...]:
    """Return the rows of an exported model that these runtimes take and no other."""
    no = f"it reads no {what}; export for it what this was made of"
    return table(*((name, False, no, "source") for name in RUNTIMES if name not in {r[0] for r in rows}), *rows)


_TENSORRT = ("TensorRT", None, "its documents take these operators, with scales above 0; none ran here", "")
_STATES = "its pipeline wants the cache inside the model, which scripts/_openvino.py does to --to onnx:qdq"
EXPORTED_AS = {
    "onnx:genai": _only(
        "ONNX", ("onnxruntime-genai", True, "", "ran"), ("OpenVINO", True, f"its runtime; {_STATES}", "ran")
    ),
    "onnx:qdq": _only("ONNX", ("onnxruntime-genai", True, "", "ran"), ("OpenVINO", True, _STATES, "ran"), _TENSORRT),
    "executorch": _only("ExecuTorch program", ("ExecuTorch", True, "", "ran")),
}
"""Who takes the models that `llmq export` makes for runtimes alone."""


def readers_of(model: str) -> list[Reader]:
    """Return a row for each runtime. model: a folder, a Hub id or a GGUF file.

    Raises LlmqError for a float checkpoint, and for one that llmq does not read.
    """
    if is_gguf(model):
        return _of_gguf(GgufFile(user_path(model)))
    folder = resolve(model)
    if (folder / EXPORTED).is_file():
        return list(_of_exported(folder))
    source = Source(folder)
    if source.quantization is None:
        raise LlmqError(
            f"{model} is a float checkpoint: its model_type tells what runs it, not llmq; quantize it first, or "
            "leave --runtime out"
        )
    if decoded_on_load(source.quantization):
        raise LlmqError(f"{model} is of a format that llmq only decodes; whom its writer names reads it")
    blank = blank_model(source, model_config(source))
    packed = PackedCheckpoint.open(source, blank)
    linears = [name for name, module in blank.named_modules() if isinstance(module, nn.Linear)]
    left = [name for name in linears if name not in packed.linears and f"{name}.weight" in source]
    rows = packed.packing.format.readers(list(packed.linears.values()), left)
    return readers(rows, of_experts(source, packed, packed.packing.format.quant_method))


def _of_exported(folder: Path) -> tuple[Reader, ...]:
    """Return the rows of a folder by its export.json. Raises LlmqError for one that llmq does not know."""
    target = field(json_object(folder / EXPORTED), "target", dict, str(folder / EXPORTED))
    names = [f"{name}:{said['dialect']}" if "dialect" in said else name for name, said in target.items()]
    if len(names) != 1 or names[0] not in EXPORTED_AS:
        raise LlmqError(f"{folder / EXPORTED} says {printable(', '.join(names), 80)}, of which llmq knows no reader")
    return EXPORTED_AS[names[0]]


def _of_gguf(file: GgufFile) -> list[Reader]:
    """Return the rows of a GGUF file, by the types of its matrices; of those that llmq does not write none ran."""
    form: Format = registry.load("formats", "gguf")
    written = {t.tensor_type.name: t for t in file.tensors.values() if t.tensor_type.name in kinds.QUANTIZED}
    ours = {kind: t for kind, t in written.items() if kinds.has_grid(kind)}
    specs = [LinearSpec(t.name, t.shape[1], t.shape[0], Scheme(kinds.grid(kind))) for kind, t in ours.items()]
    others = ", ".join(sorted(written.keys() - ours.keys()))
    limit = Limit(f"its code names {others}, of which no file ran here", notes=("llama.cpp",), known="source")
    return readers(form.readers(specs), [limit] if others else [])


def of_experts(source: Source, packed: PackedWeights, method: str) -> list[Limit]:
    """Return a limit where experts lie apart that the model's own checkpoints hold in one tensor.

    method: the `quant_method` of the checkpoint that they lie in, or will.
    """
    if not any(".experts." in name for name in packed.linears):
        return []
    names = [f"{name}.weight" for name in packed.linears] + [n for n in source.names() if n.endswith(".weight")]
    missing = match(transformers_model(source, model_config(source)), names).missing
    together = next((n for n in missing if n.rpartition(".")[0].endswith("experts")), None)
    return [] if together is None else apart(together, source.config.get("model_type"), method)
