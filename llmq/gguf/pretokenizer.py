r"""Which of llama.cpp's pre-tokenizers cuts text as a given tokenizer does.

llama.cpp has the cutting rules of every BPE family compiled in, and `tokenizer.ggml.pre` names one of them; a wrong
name loads, answers fluently, and is wrong on digits, spaces and contractions. So the name is found by behaviour: the
tokenizer and every rule below cut the same probe text, and the rule whose pieces are all equal is the one. The probe
separates every pair of rules (a test shows it). A tokenizer that cuts in any other way is refused, not guessed at.

    gpt-2       contractions, letters, digits in runs                      GPT-2
    smollm      as gpt-2, but every digit alone                            SmolLM, SmolLM2, StarCoder
    llama-bpe   digits in runs of three, ignore_merges                     Llama 3, 3.1, 3.2, 3.3
    dbrx        as llama-bpe, without ignore_merges
    qwen2       every digit alone, newlines kept with punctuation          Qwen2, Qwen2.5, Qwen3
    qwen35      as qwen2, marks stay with their letters                    Qwen3.5 and later
    tekken      capitals start a piece, no contractions, ignore_merges     Mistral Nemo, Small 3
    gpt-4o      capitals start a piece, digits in runs of three            gpt-oss

ignore_merges: a piece that is a whole entry of the vocabulary is taken as it is, whatever the merges say.
Source: llama.cpp `src/llama-vocab.cpp` (`llm_tokenizer_bpe`), tokenizer.json of the models named.
Not here: vocabulary and merges (tokenizer.py).
"""

import unicodedata
from dataclasses import dataclass
from functools import cache

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from llmq.model.pretrained import PROBE
from llmq.types import LlmqError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)


@dataclass(frozen=True)
class _Rule:
    name: str
    ignore_merges: bool
    cut: PreTokenizer


@cache
def rules() -> tuple[_Rule, ...]:
    """Return llama.cpp's rules, as pre-tokenizers of the `tokenizers` library."""
    byte_level = ByteLevel(add_prefix_space=False)

    def split(pattern: str) -> PreTokenizer:
        return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])

    return (
        _Rule("gpt-2", False, byte_level),
        _Rule("smollm", False, Sequence([Digits(individual_digits=True), byte_level])),
        _Rule("llama-bpe", True, split(_LLAMA3)),
        _Rule("dbrx", False, split(_LLAMA3)),
        _Rule("qwen2", False, split(_QWEN2)),
        _Rule("qwen35", False, split(_QWEN35)),
        _Rule("tekken", True, split(_TEKKEN)),
        _Rule("gpt-4o", False, split(_GPT4O)),
    )


def pieces(backend: Tokenizer, text: str) -> list[str]:
    """Return the pieces into which a tokenizer normalizes and cuts `text`, before any merge."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return _cut(backend.pre_tokenizer, text)


def byte_level_name(backend: Tokenizer, ignore_merges: bool) -> str:
    """Return llama.cpp's name for the cutting rule of a byte-level BPE tokenizer.

    A normalizer to NFC is passed over, as llama.cpp's own converter does. Raises LlmqError for any other normalizer and
    for a rule that llama.cpp is not known to have.
    """
    if backend.normalizer is not None:
        normal = backend.normalizer.normalize_str(PROBE)
        if normal not in (PROBE, unicodedata.normalize("NFC", PROBE)):
            raise LlmqError(
                "the tokenizer's normalizer changes text in a way that llama.cpp does not know; remove `normalizer` "
                "from tokenizer.json if the model can do without it, or write another format"
            )
    own = _cut(backend.pre_tokenizer, PROBE)
    cutting = [rule for rule in rules() if _cut(rule.cut, PROBE) == own]
    for rule in cutting:
        if rule.ignore_merges == ignore_merges:
            return rule.name
    known = ", ".join(rule.name for rule in rules())
    if cutting:
        wanted = str(cutting[0].ignore_merges).lower()
        raise LlmqError(
            f"the tokenizer cuts text like {cutting[0].name}, which llama.cpp runs with ignore_merges {wanted}, but "
            f"its tokenizer.json says otherwise; set `ignore_merges` to {wanted} there if the model was trained so"
        )
    raise LlmqError(
        f"the tokenizer cuts text in a way that llmq does not know from llama.cpp (it knows {known}); if llama.cpp has "
        "a name for it, say --format gguf:pre=NAME (of llmq export --pre NAME), else write another format"
    )


def _cut(rule: PreTokenizer | None, text: str) -> list[str]:
    return [text] if rule is None else [piece for piece, _ in rule.pre_tokenize_str(text)]
