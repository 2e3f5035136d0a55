"""The door to transformers and tokenizers: what they make of a checkpoint folder, and their exceptions as one line.

Both read files that may lie, and answer with whatever was raised first: KeyError, StrictDataclassError, a Rust panic.
Every call into them stands in a `with foreign(WHERE):`, which turns that into one LlmqError that names WHERE. They also
do more than read when a file asks: import modelling code, fetch kernels of attention from the Hub, open a file by its
name. So a config is handed over without the keys that act (`ACTING`), and the Hub is shut while they read a folder.

Not here: which tensor is which (checkpoint/names.py), opening a model for use (loading.py), the Hub itself
(checkpoint/source.py).
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.checkpoint.source import Source, refuse_adapter, refuse_links
from llmq.errors import LlmqError, one_line, printable
from llmq.guard.confined import Confined
from llmq.guard.reading import field, json_object
from llmq.model.experts import unfuse

if TYPE_CHECKING:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

ACTING = frozenset({
    "auto_map", "trust_remote_code", "custom_generate",  # code of the checkpoint
    "attn_implementation", "experts_implementation", "kernel_config", "use_kernels", "fusion_config",  # code of the Hub
    "distributed_config", "tp_plan", "device_map",  # other machines
    "name_or_path", "base_model_name_or_path", "commit_hash",  # other checkpoints
})  # fmt: skip
"""Keys of a config.json that say how to run, not what the model is; also with `_` before or `_internal` behind."""
_BUFFER_BYTES = 2**30  # of tables that a model computes for itself; rotary tables of a million positions take a tenth
_IDS = 2**24  # ids of tokens; the largest vocabularies have 2**18
_MANY, _DEEP = 2**16, 2**10  # heads, experts, widths; blocks: what may be asked for, however small the tensors are
_DEPTH = re.compile(r"(^|_)n(um)?_(hidden_)?layers?$|_layers$")
_WIDTH = re.compile(r"^(n|num|d)_|_(size|dims?|heads|experts|rank|groups|labels)$")
_POSITIVE = {
    "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
}  # fmt: skip
_BUILTIN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    SystemError, TypeError, ValueError,
)  # fmt: skip
_LIBRARIES = {
    "huggingface_hub", "jinja2", "peft", "pyarrow", "pyo3_runtime", "safetensors", "sentencepiece", "tokenizers",
    "torch", "transformers",
}  # fmt: skip

# Runs of spaces, tabs and newlines in every order, digits of every length, other digits, contractions in both cases,
# case changes, punctuation before letters and newlines, CJK, combining marks, emoji with joiners.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nHello  world 1 22 333 4444 55555 666666 7777777 3.14 v2beta "
    "I'm we'LL THEY'RE don'T it's 'tis camelCaseWord HTTPServer XMLHttpRequest2 snake_case\n\n  indented(code);\n\t}"
    '//comment/\n/path/\r\n\r\n...!!! ?? "quoted" #tag @at $5 100% a/b\u00a0c\u3000d e\u0301te\u0301 na\u00efve '
    "\u4f60\u597d\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441"
    "\u0441\u043a\u0438\u0439 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0661\u0662\u0663 \u2167 \u00bd x\u00b2 "
    "\U0001f680\U0001f636\u200d\U0001f32b\ufe0f\u2705 <tag> -->   trailing   "
)
"""A text that any two rules of cutting cut differently."""


class foreign:  # noqa: N801  (used as a statement: `with foreign(...)`)
    """Turn what transformers or tokenizers raise in the body into one LlmqError: `where: what they said`.

    Interrupts, SystemExit and our own errors pass. tokenizers raises bare `Exception`, and a panic of its Rust code is
    a BaseException that no module exports: an `except` cannot name either, so they are told apart here, by class.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, _: TracebackType | None) -> None:
        if e is None or kind is None or isinstance(e, LlmqError):
            return
        if isinstance(e, _BUILTIN) or kind is Exception or kind.__module__.partition(".")[0] in _LIBRARIES:
            said = one_line(e)
            bare = isinstance(e, LookupError | AttributeError | TypeError | AssertionError) and said != kind.__name__
            raise LlmqError(f"{self.where}: {f'{kind.__name__}: ' if bare else ''}{said}") from e


def model_config(source: Source) -> PreTrainedConfig:
    """Return what transformers reads in the source's config.json, without the keys that act.

    Raises LlmqError where transformers refuses it, and where it promises more blocks or widths than the tensors have.
    """
    from transformers import AutoConfig

    _check_numbers(source)
    with foreign(f"{source.path}/config.json (model_type {source.config.get('model_type')!r})"), shut():
        with tempfile.TemporaryDirectory() as folder:  # AutoConfig reads files only; so its own rules stay its own
            Path(folder, "config.json").write_text(json.dumps(_passive(source.config)))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._name_or_path = str(source.path)
    return config


def blank_model(source: Source, config: PreTrainedConfig, *, buffers: bool = False) -> PreTrainedModel:
    """Return the language model of a config (see `auto_class`) without weights; with its buffers real if asked.

    Fused experts are taken apart (model/experts.py).
    Raises LlmqError for a config that transformers makes no such model of, or whose buffers would fill the memory.
    """
    from accelerate import init_empty_weights

    auto = auto_class(config)
    plain = copy.deepcopy(config)  # transformers writes into a config that it builds from
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with foreign(f"{source.path}/config.json (model_type {config.model_type!r})"), shut():
        with torch.device("meta"):
            model = auto.from_config(plain, trust_remote_code=False)
        size = sum(b.nbytes for b in model.buffers())
        if size > _BUFFER_BYTES:
            raise LlmqError(f"{source.path}/config.json asks for tables of {size / 1e9:.0f} GB; no model has such")
        if buffers:
            with init_empty_weights(include_buffers=False):
                model = auto.from_config(plain, trust_remote_code=False)
        unfuse(model)
    return model.eval()


def transformers_model(source: Source, config: PreTrainedConfig) -> PreTrainedModel:
    """Return transformers' own model of a config, on meta, its experts fused. Raises LlmqError where it makes none."""
    with foreign(f"{source.path}/config.json (model_type {config.model_type!r})"), shut(), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return transformers' door to the model of a config: a causal language model, or one that reads images too.

    The latter (Gemma 3, Qwen3.5, Mistral 3 ...) wraps a language model; a config that can be either is what its
    `architectures` say, or where they are silent the whole.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    if config.get_text_config() is config:
        return AutoModelForCausalLM
    plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = plain is not None and [plain.__name__] == config.architectures
    return AutoModelForCausalLM if named else AutoModelForImageTextToText


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder. Raises LlmqError, one line, where there is none that transformers can load."""
    from transformers import AutoTokenizer

    refuse_links(folder)
    file = folder / "tokenizer_config.json"
    _check_tokenizer_config(json_object(file) if file.is_file() else {}, str(file))
    _refuse_missing(folder, ("vocab.json", "vocab.txt"))
    with foreign(f"{folder}: no tokenizer that transformers can load"), shut():
        kind = _kind_of(folder)
        made = AutoTokenizer.from_pretrained(folder, config=kind, local_files_only=True, trust_remote_code=False)
    _check_tokenizer(made, folder)  # of missing files transformers makes an empty one for many a model_type
    _try(made, folder)
    return made


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse what transformers lets pass: a vocabulary or merges that are missing, a chat template that is no text."""
    names = tokenizer.vocab_files_names
    _refuse_missing(folder, names.values())
    merges = names.get("merges_file")
    if merges and not any(folder.glob("tokenizer.*json")) and not (folder / merges).is_file():
        raise LlmqError(
            f"{folder} has a vocabulary but neither {merges} nor tokenizer.json; copy the tokenizer's files"
        )
    with foreign(f"{folder}: the tokenizer has no vocabulary"):
        top = max(tokenizer.get_vocab().values(), default=0)
    if top > _IDS:  # tokenizers writes all ids up to the last, absent ones too: gigabytes
        raise LlmqError(f"{folder}: a token has the id {top}, which no vocabulary reaches; correct tokenizer.json")
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise LlmqError(f"{folder}: its chat_template is {printable(repr(template), 80)}, not text; correct it")


def _refuse_missing(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder without a vocabulary, under one of these names or under those that any tokenizer takes."""
    patterns = ("tokenizer.*json", "*.model*", "*.tiktoken", "*.spm", "tekken.json", *names)
    if not any(f for pattern in patterns for f in folder.glob(pattern)):
        refuse_adapter(folder)  # which is the plainer reason
        raise LlmqError(
            f"{folder} has no tokenizer (tokenizer.json, a vocabulary or .model file); copy its files there"
        )


def _try(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Let a child process cut a text first, by whatever regular expressions tokenizer.json has.

    Raises LlmqError where they take too long. Where they panic, Rust prints pages, which the child keeps to itself.
    """

    def cut(_: None) -> None:
        try:
            with foreign(f"{folder}: the tokenizer cannot cut a text"):
                tokenizer(PROBE)
        except LlmqError as e:
            if not isinstance(e.__cause__, Exception):  # a panic; another exception is raised again by a user's text
                raise

    with Confined(cut, f"{folder}: the tokenizer, cutting a text,") as call:
        call(None)


def check_ids(ids: Tensor | Sequence[int], model: Any) -> None:
    """Raise LlmqError for token ids of which the model has no embedding; its tokenizer has had tokens added."""
    rows = model.get_input_embeddings().num_embeddings
    top = int(torch.as_tensor(ids).max())
    if top >= rows:
        raise LlmqError(
            f"the tokenizer gives token {top}, but the model has embeddings of {rows} tokens only; take the tokenizer "
            "that belongs to it, or resize its embeddings (resize_token_embeddings) and save it"
        )


def _kind_of(folder: Path) -> PreTrainedConfig:
    """Return a config of the folder's model_type and nothing else: all by which AutoTokenizer chooses a class."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    file = folder / "config.json"
    said = json_object(file) if file.is_file() else {}
    model_type = field(said, "model_type", str, str(file), "")
    named = field(said, "tokenizer_class", str, str(file), "") if said.get("tokenizer_class") is not None else None
    _check_tokenizer_config({"tokenizer_class": named}, str(file))
    known = model_type in CONFIG_MAPPING
    made: Any = CONFIG_MAPPING[model_type] if known else PreTrainedConfig
    kind = made()
    kind.tokenizer_class, kind._name_or_path = named, str(folder)
    return kind


def _check_tokenizer_config(said: Mapping[str, Any], where: str) -> None:
    """Refuse what would make transformers import another thing than a tokenizer or read another folder's file."""
    import transformers

    name = said.get("tokenizer_class")
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    tokenizer = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
    if not (name is None or isinstance(name, str)) or (found is not None and not tokenizer):
        raise LlmqError(f"{where}: tokenizer_class {name!r} is no tokenizer of transformers; correct it or take it out")
    files = said.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or any(not isinstance(f, str) or Path(f).name != f for f in files):
        raise LlmqError(f"{where}: fast_tokenizer_files must be a list of names of files beside it; take it out")


def _passive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its keys that act, at any depth; `quantization_config` as it is."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key.strip("_").removesuffix("_internal") not in ACTING:
            inner = isinstance(value, dict) and key != "quantization_config"
            kept[key] = _passive(value) if inner else value
    return kept


def _check_numbers(source: Source) -> None:
    """Refuse numbers in config.json that no model of these tensors has, before anything is made of them."""
    shapes = [shape for _, shape in source.headers().values()]
    widest = max([_MANY, len(shapes), *(n for shape in shapes for n in shape)])
    numbered = [int(n) for name in source.names() for n in re.findall(r"\.(\d{1,6})\.", name)]
    deepest = max([_DEEP, *(n + 1 for n in numbered)])
    for key, n in _integers(source.config):
        limit = deepest if _DEPTH.search(key) else widest if _WIDTH.search(key) else n
        if n > limit or (n < 1 and key in _POSITIVE):
            raise LlmqError(f"{source.path}/config.json: {key} is {n}, which no model of these tensors has; correct it")


def _integers(value: Any) -> Iterator[tuple[str, int]]:
    """Yield every integer of a config by its key, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else (("", v) for v in value):
        if type(inner) is int:
            yield key, inner
        elif isinstance(inner, dict | list) and key != "quantization_config":
            yield from _integers(inner)


@contextmanager
def shut() -> Iterator[None]:
    """Shut the Hub and hold back bars, logs and warnings while transformers reads a folder: errors say it."""
    from huggingface_hub import constants
    from transformers.utils import logging

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
