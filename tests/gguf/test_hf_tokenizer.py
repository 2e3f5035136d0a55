"""A tokenizer made from GGUF keys cuts as the one that the file was written from; what it cannot repeat is refused."""

from __future__ import annotations

import gguf
import pytest
from _tiny import make_prose, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llmq.errors import LlmqError
from llmq.gguf.hf_tokenizer import special_ids, tokenizer_from
from llmq.gguf.reader import GgufFile
from llmq.gguf.tokenizer import vocabulary
from llmq.model.pretrained import PROBE

SPACE = "\u2581"


def written(path, tokenizer, change=None):
    """Write a GGUF file of keys alone."""
    rows = len(tokenizer.get_vocab())
    said = vocabulary(tokenizer, rows, LlamaConfig(vocab_size=rows))
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (change or {}).items():
        object.__setattr__(said, key, value)
    said.describe(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path)


def sentencepiece(prefix):
    """Return a small BPE with byte fallback, as transformers makes of a sentencepiece model."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    letters = [SPACE, *"thecityoand"]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the"), ("i", "t"), ("c", "it"), ("cit", "y"), (SPACE, "city")]
    for text in dict.fromkeys([*letters, *("".join(m) for m in merges)]):
        vocab[text] = len(vocab)
    merges += [("c", "i"), ("i", "ty"), ("t", "y")]  # of no effect: their pieces are none
    known = [m for m in merges if "".join(m) in vocab and m[0] in vocab and m[1] in vocab]
    backend = Tokenizer(models.BPE(vocab, known, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    before = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes, with BOS": lambda: make_tokenizer(bos=True),
    "bytes": lambda: make_tokenizer(bos=False),
    "sentencepiece": lambda: sentencepiece(True),
    "sentencepiece without a space before": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_it_cuts_and_joins_as_the_one_that_was_written(kind, tmp_path):
    want = TOKENIZERS[kind]()
    made = tokenizer_from(file := written(tmp_path / "x.gguf", want))
    for text in (make_prose(60), PROBE, "the city </s> the city", "", " the", "<s>"):
        ids = want(text).input_ids
        assert made(text).input_ids == ids
        assert made.decode(ids).strip() == want.decode(ids).strip()
    assert (made.bos_token_id, made.eos_token_id) == (want.bos_token_id, want.eos_token_id)
    assert special_ids(file) == {"bos_token_id": want.bos_token_id, "eos_token_id": want.eos_token_id}
    assert made.chat_template == want.chat_template
    made.save_pretrained(tmp_path / "t")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")("the city").input_ids == want("the city").input_ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "bert"}, "a tokenizer of model 'bert' with 320 tokens and 320 types is not made"),
        ({"pre": "deepseek-v3"}, "the pre-tokenizer 'deepseek-v3' is not among those that are made"),
        ({"types": [1] * 319}, "320 tokens and 319 types is not made"),
        ({"merges": ["the zebra"]}, "its tokenizer: "),
        ({"add_bos": True, "special": {"eos": 1}}, "no tokenizer of transformers has the add_bos"),
        ({"special": {"bos": 5000}}, "no tokenizer of transformers has the special"),
    ],
)
def test_keys_that_no_tokenizer_has_are_refused_in_one_line(change, said, tmp_path):
    with pytest.raises(LlmqError) as e:
        tokenizer_from(written(tmp_path / "x.gguf", make_tokenizer(bos=False), change))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_piece_as_long_as_no_vocabulary_has_is_refused(tmp_path):
    """Every prefix of a piece is looked up: of 4 million characters for 20 minutes."""
    tokenizer = sentencepiece(True)
    rows = len(tokenizer.get_vocab())
    said = vocabulary(tokenizer, rows, LlamaConfig(vocab_size=rows))
    tokens = [*said.tokens[:-1], "a" * 4_000_000]
    with pytest.raises(LlmqError, match=r"a token of 4,000,000 characters is not read, at most 512"):
        tokenizer_from(written(tmp_path / "x.gguf", tokenizer, {"tokens": tokens}))


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "starcoder"])
def test_a_real_vocabulary_cuts_as_llama_cpps_authors_expect(name, vocabularies, expected):
    made = tokenizer_from(GgufFile(vocabularies / f"ggml-vocab-{name}.gguf"))
    for text, ids in expected(name):
        assert made(text, add_special_tokens=False).input_ids == ids, text
