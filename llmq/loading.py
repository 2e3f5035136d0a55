"""Open a checkpoint, float or quantized, as an ordinary transformers model.

Weights come from safetensors only and no code of a checkpoint is ever run: a pickle, or a model with modelling code of
its own, is refused, with what to do instead. transformers' quantizer mappings are replaced during the call and put back
after it (integrations/transformers.py), so that `llmq.load` neither needs `register()` nor undoes it.
Not here: reading tensors one at a time, which quantizing uses (checkpoint/).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import as_floats, decoded_on_load
from llmq.checkpoint.names import settle
from llmq.checkpoint.packed import Packing
from llmq.errors import LlmqError
from llmq.guard.reading import Entry
from llmq.integrations.compiled import compile_for_generation
from llmq.integrations.transformers import registered
from llmq.model.device import device_of
from llmq.model.pretrained import auto_class, blank_model, foreign, model_config, shut, tokenizer_of

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = "auto",
    backend: str = "auto",
    compile: bool = False,
) -> PreTrainedModel:
    """Return the model at `path`, in eval mode, its quantized linears computing from packed weights.

    A causal language model, or the whole of one that reads images too. Narrow floats that no format of llmq writes
    (DeepSeek's FP8, gpt-oss' MXFP4 ...) are decoded as they are read, to the model's dtype: it is then a float model.

    path: a local folder or a Hub id.
    dtype: of the float weights and the activations; None is the checkpoint's own. Packed tensors keep theirs.
    device: "auto" is cuda where available, else cpu.
    backend: "auto" gives every quantized linear the first back-end of llmq/runtime that can run it; "reference" decodes
        weights exactly and rounds nothing else, slowly.
    compile: on a GPU, have `generate` run with a static cache, decode as a CUDA graph and prefill compiled region by
        region (integrations/compiled.py); compiling takes a minute or so at the first tokens.
    Raises LlmqError, one line, for whatever is wrong with the path or the checkpoint.
    """
    source = Source(resolve(str(path)))
    if decoded_on_load(source.quantization):
        for line in as_floats(source):
            log.info(line)
    folder, packed = source.path, source.quantization
    if packed is not None:
        Packing(packed)  # refuses in one line what llmq does not read
    target, config = device_of(device), model_config(source)
    if compile and target.type == "cpu":
        raise LlmqError("compile=True makes CUDA graphs, and this is for a CPU: load without it, or device='cuda'")
    config.quantization_config = packed  # transformers looks for it in config.json alone
    blank = blank_model(source, config)
    auto, given = _from(source, blank)
    settle(source, blank, converts=True)
    with registered(backend=backend), foreign(f"{folder}: transformers cannot load it"), shut():
        loaded: Any = auto.from_pretrained(
            **given,
            config=config,
            dtype=dtype or (source.dtype if source.decoded else "auto"),
            device_map=None if target.type == "cpu" else {"": target},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    model, info = loaded
    _check_loaded(folder, info)
    for warning in source.warnings:
        log.warning(warning)
    if source.decoded and (folder / "generation_config.json").is_file():
        with foreign(f"{folder}/generation_config.json"), shut():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if compile:
        compile_for_generation(model)
    return model.eval()


def _from(source: Source, blank: Any) -> tuple[Any, dict[str, Any]]:
    """Return what loads a source that is not settled yet, and from where: its folder, or decoded tensors one by one."""
    if not source.decoded:
        return auto_class(blank.config), {"pretrained_model_name_or_path": source.path}
    tensors = {name: _Unread(entry) for name, entry in source.entries().items()}
    return type(blank), {"pretrained_model_name_or_path": None, "state_dict": tensors}


class _Unread:
    """A tensor that transformers reads when it comes to it, as it does those of a safetensors file."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def __getitem__(self, index: Any) -> Tensor:
        return self._entry.read()[index]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer at `path`, a local folder or a Hub id. Raises LlmqError, one line, where there is none."""
    return tokenizer_of(resolve(str(path)))


def as_dtype(name: str | None) -> torch.dtype | None:
    """Return the float dtype of that name. Raises LlmqError for another."""
    dtype = getattr(torch, name or "", None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LlmqError(f"dtype {name!r} is not one of float32, bfloat16, float16")
    return dtype


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model with weights that transformers had to make up."""
    for names, what in (
        ([str(name) for name in info["missing_keys"]], "is missing"),
        (
            [f"{name} {list(got)}" for name, got, _ in info["mismatched_keys"]],
            "is not the shape in config.json",
        ),
    ):
        if names:
            first, *more = sorted(names)
            others = f" (and {len(more)} more)" if more else ""
            raise LlmqError(f"{folder}: tensor {first} {what}{others}; download or write the checkpoint again")
