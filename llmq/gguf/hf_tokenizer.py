"""A tokenizer of transformers made from a GGUF file's keys: tokenizer.py the other way round.

What is made is held against the keys by writing it as GGUF again: the same tokens, types, merges or scores, the same
rule of cutting, the same ids around a text. What does not come back equal is not handed out.
Not here: which text is cut where (pretokenizer.py), what the keys are (tokenizer.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from llmq.errors import LlmqError, printable
from llmq.gguf.pretokenizer import rules
from llmq.gguf.reader import GgufFile
from llmq.gguf.tokenizer import SPECIAL, Vocabulary, vocabulary
from llmq.model.pretrained import foreign

_KEY = "tokenizer.ggml."
_SPACE = "\u2581"
_LONGEST = 512  # characters of a piece of sentencepiece, whose own limit is 16 by default: every prefix is looked up
_BEGIN = ("llama-bpe", "tekken")  # rules with which llama.cpp puts BOS before a text where no key says it
_ALIASES = {
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm", "phi-2": "gpt-2",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
_NAMED = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # what keys call them otherwise, spelled so
_COMPARED = ("model", "pre", "tokens", "types", "merges", "add_space_prefix", "special", "add_bos", "add_eos")


def tokenizer_from(file: GgufFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file.

    Raises LlmqError for one of another kind than byte-level BPE or sentencepiece's, of a pre-tokenizer that is not
    known, and where what is made is not what the keys say.
    """
    said = _said(file)
    with foreign(f"{file.path}: its tokenizer"):
        backend = _byte_level(said) if said.model == "gpt2" else _sentencepiece(said)
        _add(backend, said)
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=said.chat_template,
            clean_up_tokenization_spaces=False,
            **{f"{name}_token": said.tokens[i] for name, i in said.special.items() if i < len(said.tokens)},
        )
    again = vocabulary(made, len(said.tokens), None)
    odd = [key for key in _COMPARED if getattr(again, key) != getattr(said, key)]
    if said.model == "llama" and list(_merges(again)) != list(_merges(said)):
        odd.append("order of scores")
    if odd:
        raise LlmqError(f"{file.path}: no tokenizer of transformers has the {', '.join(odd)} that its keys say")
    return made


def special_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of bos, eos and pad that a file names, as config.json does."""
    found = {name: file.value(f"{_KEY}{_NAMED.get(name, name)}_token_id") for name in ("bos", "eos", "pad")}
    return {f"{name}_token_id": i for name, i in found.items() if isinstance(i, int)}


def _said(file: GgufFile) -> Vocabulary:
    """Return what the keys say. Raises LlmqError where they are missing or of another type."""

    def of(key: str, kind: type, default: Any) -> Any:
        value = file.value(_KEY + key)
        value = value.tolist() if hasattr(value, "tolist") else value
        value = default if value is None else value
        if value is not None and not isinstance(value, kind):
            raise LlmqError(f"{file.path}: key {_KEY}{key} is no {kind.__name__}")
        return value

    model, tokens, types = of("model", str, ""), of("tokens", list, []), of("token_type", list, [])
    texts = bool(tokens) and all(isinstance(t, str) for t in tokens)
    scores = of("scores", list, []) if model == "llama" else None
    counts = {len(types), len(tokens), len(tokens if scores is None else scores)}
    if model not in ("gpt2", "llama") or not texts or len(counts) > 1:
        raise LlmqError(
            f"{file.path}: a tokenizer of model {printable(repr(model), 40)} with {len(tokens)} tokens and "
            f"{len(types)} types is not made; copy the tokenizer of the model that it was made from"
        )
    pre = of("pre", str, "default")
    template = file.value("tokenizer.chat_template")
    ids = {name: of(f"{_NAMED.get(name, name)}_token_id", int, None) for name in SPECIAL}
    return Vocabulary(
        model=model,
        pre=_ALIASES.get(pre, pre),
        tokens=tokens,
        types=types,
        merges=of("merges", list, None) if model == "gpt2" else None,
        scores=scores,
        add_space_prefix=of("add_space_prefix", bool, True) if model == "llama" else None,
        special={name: i for name, i in ids.items() if i is not None},
        add_bos=of("add_bos_token", bool, model == "llama" or pre in _BEGIN),
        add_eos=of("add_eos_token", bool, False),
        chat_template=None if template is None else str(template),
    )


def _vocab(said: Vocabulary) -> dict[str, int]:
    used = (i for i, kind in enumerate(said.types) if kind != TokenType.UNUSED)
    return {said.tokens[i]: i for i in used}


def _byte_level(said: Vocabulary) -> Tokenizer:
    rule = next((r for r in rules() if r.name == said.pre), None)
    if rule is None:
        raise LlmqError(
            f"the pre-tokenizer {printable(said.pre, 40)!r} is not among those that are made "
            f"({', '.join(r.name for r in rules())}); copy the tokenizer of the model that it was made from"
        )
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in said.merges or ())]
    backend = Tokenizer(models.BPE(vocab=_vocab(said), merges=merges, ignore_merges=rule.ignore_merges))
    backend.pre_tokenizer, backend.decoder = rule.cut, decoders.ByteLevel()
    return backend


def _sentencepiece(said: Vocabulary) -> Tokenizer:
    longest = max((len(text) for text in _pieces(said)), default=0)
    if longest > _LONGEST:
        raise LlmqError(
            f"a token of {longest:,} characters is not read, at most {_LONGEST} are; copy the tokenizer of the model "
            "that it was made from"
        )
    unknown = said.special.get("unk")
    model = models.BPE(
        vocab=_vocab(said),
        merges=list(_merges(said)),
        unk_token=None if unknown is None else said.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend, prefix = Tokenizer(model), [normalizers.Prepend(_SPACE)] if said.add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*plain, *([decoders.Strip(" ", 1, 0)] if said.add_space_prefix else [])])
    return backend


def _merges(said: Vocabulary) -> Iterator[tuple[str, str]]:
    """Yield the pairs that sentencepiece merges, the best score first: every way to part a piece in two others."""
    pieces = _pieces(said)
    for text in sorted(pieces, key=lambda t: -pieces[t]):
        for i in range(1, len(text)):
            if text[:i] in pieces and text[i:] in pieces:
                yield text[:i], text[i:]


def _pieces(said: Vocabulary) -> dict[str, float]:
    """Return the scores of the tokens that merges make."""
    scored = zip(said.tokens, said.scores or (), said.types, strict=True)
    return {text: score for text, score, kind in scored if kind == TokenType.NORMAL}


def _add(backend: Tokenizer, said: Vocabulary) -> None:
    """Give a tokenizer its added tokens, and what it puts around a text."""
    kinds = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    for text, kind in zip(said.tokens, said.types, strict=True):
        if kind in kinds:
            backend.add_tokens([AddedToken(text, special=kinds[TokenType(kind)], normalized=False)])
    around = [(said.add_bos, "bos"), (said.add_eos, "eos")]
    put = {name: said.tokens[said.special[name]] for add, name in around if add and name in said.special}
    if put:
        single = _template("$A:0", put)
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *_template("$B:1", put)],
            special_tokens=[(text, said.tokens.index(text)) for text in put.values()],
        )


def _template(text: str, put: Mapping[str, str]) -> Sequence[str]:
    """Return what is put around a text, piece by piece."""
    return [*([put["bos"]] if "bos" in put else []), text, *([put["eos"]] if "eos" in put else [])]
