"""Classes of tokens, of byte-level and of sentencepiece vocabularies."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmq.evaluation.classes import CLASSES, classes

BYTE_LEVEL = pre_tokenizers.ByteLevel.alphabet()


def byte_level(pieces):
    spelled = {
        p: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(p)[0][0] for p in pieces
    }
    vocabulary = {s: i for i, s in enumerate(dict.fromkeys(["<s>", *spelled.values(), *BYTE_LEVEL]))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), [vocabulary[s] for s in spelled.values()]


def sentencepiece(pieces):
    spelled = [p.replace(" ", "\u2581") for p in pieces]
    vocabulary = {s: i for i, s in enumerate(dict.fromkeys(["<s>", *spelled]))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), [vocabulary[s] for s in spelled]


TEXT = [
    " The",
    " year",
    " 19",
    "84",
    ",",
    " un",
    "quant",
    "ized",
    "\n",
    "But",
    " \u0434\u0430",
    "\u65e5\u672c",
    "  ",
    "f",
    "(",
    "x",
    ")",
    " d'",
    "\u00e9t\u00e9",
]
WANTED = [
    "words", "words", "numbers", "numbers", "punctuation", "words", "word pieces", "word pieces", "whitespace", "words",
    "other scripts", "other scripts", "whitespace", "words", "punctuation", "words", "punctuation", "words", "words",
]  # fmt: skip


@pytest.mark.parametrize("vocabulary", [byte_level, sentencepiece])
def test_every_class(vocabulary):
    tokenizer, ids = vocabulary(TEXT)
    x = torch.tensor([0, *ids])
    assert [CLASSES[i] for i in classes(x[1:], x[:-1], tokenizer)] == WANTED


def test_bytes_and_special_tokens():
    tokenizer, _ = byte_level([])
    half = tokenizer.convert_tokens_to_ids(
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\u65e5")[0][0][0]
    )
    found = classes(torch.tensor([half, 0, 10_000]), torch.tensor([0, half, 0]), tokenizer)
    assert [CLASSES[i] for i in found] == ["bytes", "special", "special"]
    pieces = {"<s>": 0, "<0xE6>": 1, "<0x0A>": 2, "<0x41>": 3, "a": 4}
    fallback = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(pieces, [], byte_fallback=True)), bos_token="<s>"
    )
    found = classes(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3]), fallback)
    assert [CLASSES[i] for i in found] == ["bytes", "whitespace", "words", "word pieces"]
