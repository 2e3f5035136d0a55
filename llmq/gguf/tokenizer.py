"""A Hugging Face tokenizer as GGUF metadata.

    tokenizer.ggml.model   gpt2 (byte-level BPE) | llama (sentencepiece: spaces are U+2581, unknown bytes are <0xXX>)
    tokenizer.ggml.tokens, .token_type, .merges (gpt2) or .scores (llama), .pre, special ids, add_bos / add_eos

Sentencepiece merges by score, Hugging Face by rank: a piece's score is minus its place among the merged pieces, so that
both take the same pair first. What is put around a text is read from what the tokenizer does, not from its flags.
Source: the `gguf` package's `Keys.Tokenizer`; llama.cpp `conversion/base.py` and `src/llama-vocab.cpp`.
Not here: which text is cut where (pretokenizer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
from gguf import TokenType

from llmq.gguf import pretokenizer
from llmq.types import LlmqError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # sentencepiece's visible space
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unk", "sep": "sep", "pad": "pad", "mask": "mask"}
_ATOM_SCORE = -1e6  # of pieces that no merge makes: never compared by a tokenizer that came from sentencepiece


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenize. `tokens` has one entry for every row of the embedding.

    merges: `"left right"`, for model gpt2; scores: for model llama.
    add_space_prefix: whether a text is tokenized as if a space preceded it; None where the model has no such rule.
    special: ids by the writer's names (bos, eos, ...).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space_prefix: bool | None = None
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | list[dict[str, str]] | None = None
    warnings: list[str] = field(default_factory=list)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer's keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Any, rows: int, config: Any, pre: str | None = None) -> Vocabulary:
    """Return the vocabulary of a transformers tokenizer for a model whose embedding has `rows` rows.

    config: the model's, for special ids that the tokenizer does not name. pre: llama.cpp's name of the pre-tokenizer,
    where the user says it; None finds it.
    Raises LlmqError for a tokenizer without a `tokenizers` backend, of another kind than BPE, larger than the
    embedding, or whose behaviour llama.cpp cannot repeat.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LlmqError("the tokenizer has no tokenizer.json; save it as one with transformers' save_pretrained")
    model = json.loads(backend.to_str())["model"]
    ids = backend.get_vocab(with_added_tokens=True)
    if not ids:
        raise LlmqError("the checkpoint has no tokenizer, which a GGUF file must hold; copy its tokenizer files")
    if model["type"] != "BPE":
        raise LlmqError(f"the tokenizer is a {model['type']} model; llmq writes BPE tokenizers as GGUF")
    if max(ids.values()) >= rows:
        raise LlmqError(
            f"the tokenizer has ids up to {max(ids.values())}, the embedding {rows} rows; the checkpoint needs the "
            "tokenizer it was trained with"
        )
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = backend.get_added_tokens_decoder()
    spaced = _sentencepiece_prefix(backend) if model.get("byte_fallback") else None
    tokens, types = _tokens(ids, added, rows, model, spaced is not None)
    add_bos, add_eos, special = _surroundings(tokenizer, config)
    common = {
        "tokens": tokens,
        "types": types,
        "special": {_SPECIAL[k]: v for k, v in special.items()},
        "add_bos": add_bos,
        "add_eos": add_eos,
        "chat_template": _template(tokenizer),
    }
    warnings = _warnings(added)
    if spaced is None:
        name = pre or pretokenizer.byte_level_name(backend, bool(model.get("ignore_merges")))
        return Vocabulary("gpt2", name, merges=[" ".join(p) for p in pairs], warnings=warnings, **common)
    if unmerged := _unmerged(model["vocab"], pairs):
        warnings.append(
            f"{unmerged} pairs of pieces make a piece that the tokenizer never merges, but llama.cpp does; check a few "
            "texts with llama-tokenize"
        )
    scores = _scores(tokens, types, pairs)
    return Vocabulary("llama", "default", scores=scores, add_space_prefix=spaced, warnings=warnings, **common)


def _tokens(
    ids: Mapping[str, int], added: Mapping[int, Any], rows: int, model: Mapping[str, Any], spaced: bool
) -> tuple[list[str], list[int]]:
    """Return text and type of every id; rows beyond the vocabulary are unused padding."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, i in ids.items():
        tokens[i], types[i] = text, TokenType.NORMAL
        if spaced and _BYTE.fullmatch(text):
            types[i] = TokenType.BYTE
        if i in added:
            control = added[i].special or (text.startswith("<|") and text.endswith("|>"))
            types[i] = TokenType.CONTROL if control else TokenType.USER_DEFINED
            tokens[i] = text if control else text.replace(_SPACE, " ")
        if text == model.get("unk_token"):
            types[i] = TokenType.UNKNOWN
    twice = {t for t in tokens if tokens.count(t) > 1} if len(set(tokens)) < rows else set()
    if twice:
        raise LlmqError(f"two ids of the tokenizer have the text {min(twice)!r}, which llama.cpp refuses; rename one")
    return tokens, [int(t) for t in types]


def _sentencepiece_prefix(backend: Any) -> bool:
    """Return whether a sentencepiece-like tokenizer puts a space before a text.

    Raises LlmqError where it does anything to text beyond making spaces visible.
    """
    text = pretokenizer.PROBE.lstrip()
    visible = text.replace(" ", _SPACE)
    found = pretokenizer.pieces(backend, text)
    for prefix in (True, False):
        if found == [(_SPACE if prefix else "") + visible]:
            return prefix
    raise LlmqError(
        "the tokenizer has byte fallback but does not treat text as sentencepiece does (spaces to U+2581, nothing "
        "else), so that llama.cpp cannot repeat it; write another format"
    )


def _surroundings(tokenizer: Any, config: Any) -> tuple[bool, bool, dict[str, int]]:
    """Return whether BOS and EOS are put around a text, and the special ids."""
    special = {}
    for name in _SPECIAL:
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is None:
            token = getattr(config, f"{name}_token_id", None)
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            special[name] = int(token)
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    before, after = (whole, []) if at is None else (whole[:at], whole[at + len(bare) :])
    if before not in ([], [special.get("bos")]) or after not in ([], [special.get("eos")]):
        raise LlmqError(
            f"the tokenizer puts ids {before} before and {after} after a text; llama.cpp can put BOS before and EOS "
            "after, and nothing else: correct `post_processor` in tokenizer.json"
        )
    return bool(before), bool(after), special


def _template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _scores(tokens: Sequence[str], types: Sequence[int], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """Return sentencepiece scores: minus the rank of each merged piece; control and byte pieces 0."""
    rank: dict[str, int] = {}
    for pair in pairs:
        rank.setdefault("".join(pair), len(rank))
    return [
        (-float(rank[text]) if text in rank else _ATOM_SCORE) if kind == TokenType.NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _unmerged(vocab: Mapping[str, int], pairs: Sequence[tuple[str, ...]]) -> int:
    """Return how many ways of cutting a piece in two pieces have no merge; sentencepiece would merge them."""
    known, merged = set(pairs), {"".join(p) for p in pairs}
    return sum(
        (text[:i], text[i:]) not in known
        for text in merged
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    )


def _warnings(added: Mapping[int, Any]) -> list[str]:
    stripping = [t.content for t in added.values() if t.lstrip or t.rstrip]
    if not stripping:
        return []
    more = f" (and {len(stripping) - 1} more)" if len(stripping) > 1 else ""
    return [f"the tokenizer strips spaces beside {stripping[0]!r}{more}, llama.cpp does not"]
