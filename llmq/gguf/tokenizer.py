"""A Hugging Face tokenizer as GGUF metadata.

    tokenizer.ggml.model   gpt2 (byte-level BPE) | llama (sentencepiece: spaces are U+2581, unknown bytes are <0xXX>)
    tokenizer.ggml.tokens, .token_type, .merges (gpt2) or .scores (llama), .pre, special ids, add_bos / add_eos

Sentencepiece merges by score, Hugging Face by rank: a piece's score is minus its place among the merged pieces, so that
both take the same pair first. What is put around a text is read from what the tokenizer does, not from its flags.
Source: the `gguf` package's `Keys.Tokenizer`; llama.cpp `conversion/base.py` and `src/llama-vocab.cpp`.
Not here: which text is cut where (pretokenizer.py).
"""

import json
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import Tokenizer

from llmq.errors import printable
from llmq.gguf import pretokenizer
from llmq.model.pretrained import foreign
from llmq.types import LlmqError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # sentencepiece's visible space
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_UNKNOWN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # of tokenizer.json's model
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
    if odd := [key for key in _UNKNOWN if model.get(key)]:
        raise LlmqError(f"tokenizer.json sets {odd[0]}, which llama.cpp does not know; write another format")
    supplied = _supplied(tokenizer, ids, rows)
    ids = {text: i for text, i in ids.items() if text not in supplied}
    if max(ids.values()) >= rows:
        raise LlmqError(
            f"the tokenizer has ids up to {max(ids.values())}, the embedding {rows} rows; the checkpoint needs the "
            "tokenizer it was trained with"
        )
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = backend.get_added_tokens_decoder()
    spaced = _sentencepiece_prefix(backend) if model.get("byte_fallback") else None
    tokens, types = _tokens(ids, added, rows, model, spaced is not None)
    add_bos, add_eos, special = _surroundings(tokenizer, config, rows, frozenset(supplied.values()))
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "add_bos": add_bos,
        "add_eos": add_eos,
        "chat_template": _template(tokenizer),
    }
    warnings = _warnings({i: t for i, t in added.items() if i < rows}, common["chat_template"])
    if supplied:
        what = ", ".join(printable(text, 40) for text in supplied)
        warnings.append(f"{what}, which transformers adds and tokenizer.json and the embedding lack, is left out")
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


def _supplied(tokenizer: Any, ids: Mapping[str, int], rows: int) -> dict[str, int]:
    """Return the tokens beyond the embedding that transformers' class adds by itself: tokenizer.json lacks them.

    Qwen2Tokenizer does so with <|endoftext|>, where a model of that architecture has a vocabulary of its own.
    """
    beyond = {text: i for text, i in ids.items() if i >= rows}
    file = Path(str(getattr(tokenizer, "name_or_path", ""))) / "tokenizer.json"
    if not beyond or not file.is_file():
        return {}
    with foreign(str(file)):
        own = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    return {text: i for text, i in beyond.items() if text not in own}


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
    (common, n), *_ = Counter(tokens).most_common(1)
    if n > 1:
        raise LlmqError(f"{n} ids of the tokenizer have the text {common!r}, which llama.cpp refuses; rename them")
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


def _special(name: str, tokenizer: Any, config: Any, rows: int, supplied: Container[int]) -> int | None:
    """Return the id of `bos`, `eos` ... by the tokenizer, else by the model's config; None where there is none.

    A negative one means none, and so does a supplied one. Raises LlmqError for one that the embedding has no row of.
    """
    token = getattr(tokenizer, f"{name}_token_id", None)
    token = getattr(config, f"{name}_token_id", None) if token is None or token in supplied else token
    token = next(iter(token), None) if isinstance(token, list) else token
    if token is None or (isinstance(token, int) and token < 0):
        return None
    if not isinstance(token, int) or token >= rows:
        raise LlmqError(f"{name}_token_id is {token!r}, no row of the embedding, which has {rows}; correct config.json")
    return token


def _surroundings(
    tokenizer: Any, config: Any, rows: int, supplied: Container[int]
) -> tuple[bool, bool, dict[str, int]]:
    """Return whether BOS and EOS are put around a text, and the special ids."""
    with foreign("the tokenizer cannot cut a text"):
        special = {n: token for n in SPECIAL if (token := _special(n, tokenizer, config, rows, supplied)) is not None}
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


def _warnings(added: Mapping[int, Any], template: str | list[dict[str, str]] | None) -> list[str]:
    found = []
    stripping = [t.content for t in added.values() if t.lstrip or t.rstrip]
    if stripping:
        more = f" (and {len(stripping) - 1} more)" if len(stripping) > 1 else ""
        found.append(f"the tokenizer strips spaces beside {stripping[0]!r}{more}, llama.cpp does not")
    if lone := [t.content for t in added.values() if t.single_word]:
        found.append(f"the tokenizer sees {lone[0]!r} as a word of its own only, llama.cpp also within words")
    if isinstance(template, list) and all(t["name"] != "default" for t in template):
        names = ", ".join(t["name"] for t in template)
        found.append(f"none of the chat templates ({names}) is called default, which llama.cpp takes unless told")
    return found
