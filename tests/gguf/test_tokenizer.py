"""Tokenizers written as GGUF: against llama.cpp's vocabulary files, their expected ids, and llama.cpp itself."""

import copy
import json
import time

import gguf
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llmq.gguf.architecture import architecture
from llmq.gguf.pretokenizer import byte_level_name, pieces, rules
from llmq.gguf.tokenizer import vocabulary
from llmq.loading import load_tokenizer
from llmq.model.pretrained import PROBE, tokenizer_of
from llmq.types import LlmqError

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
WITH_MARKS = REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
QWEN35 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|" + WITH_MARKS
AWKWARD = (
    "def f(x):\n    return x**2  # squared\n\n\tif x >= 10: pass",
    "naïve café — “quotes” … 👩‍👩‍👧‍👦 🇩🇪 emoji",
    "你好，世界。日本語テキスト 한국어 русский العربية",
    "   leading,  double   spaces   and trailing   ",
    "0 12 345 6789 3.14159 1,000,000 2024-01-31",
    "don't I'LL we've it's THEY'RE",
)
SPACE = "\u2581"


def byte_level(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


FAMILIES = {  # vocabulary -> what cuts text in that family's tokenizer.json, ignore_merges, llama.cpp's name
    "llama-bpe": (byte_level(LLAMA3), True, "llama-bpe"),
    "qwen2": (byte_level(QWEN2), False, "qwen2"),
    "qwen35": (byte_level(QWEN35), False, "qwen35"),
    "starcoder": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
        False,
        "smollm",
    ),
    "gpt-2": (pre_tokenizers.ByteLevel(False), False, "gpt-2"),
}


def as_hugging_face(key):
    """Return the Hugging Face tokenizer of a vocabulary file, built as the family's tokenizer.json is."""
    name, tokens, types = key["tokenizer.ggml.pre"], key["tokenizer.ggml.tokens"], key["tokenizer.ggml.token_type"]
    real = {t: i for i, t in enumerate(tokens) if not t.startswith("[PAD")}
    if key["tokenizer.ggml.model"] == "llama":
        backend = sentencepiece(real, key["tokenizer.ggml.scores"])
    else:
        cut, ignore, _ = FAMILIES[name]
        merges = [tuple(m.split(" ")) for m in key["tokenizer.ggml.merges"]]
        backend = Tokenizer(models.BPE(vocab=real, merges=merges, ignore_merges=ignore))
        backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    control = [AddedToken(t, special=True, normalized=False) for t, i in real.items() if types[i] in (2, 3)]
    backend.add_special_tokens(control)
    special = {f"{n}_token": tokens[key[f"tokenizer.ggml.{n}_token_id"]] for n in ("bos", "eos")}
    if key.get("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def sentencepiece(vocab, scores):
    """Return the BPE that transformers makes of a sentencepiece model: a merge for every way to cut a piece in two."""
    merges = [
        (-scores[i], vocab[t[:n]], vocab[t[n:]], t[:n], t[n:])
        for t, i in vocab.items()
        if len(t) > 1 and not t.startswith("<0x")
        for n in range(1, len(t))
        if t[:n] in vocab and t[n:] in vocab
    ]
    pairs = [pair for *_, pair in sorted((*m[:3], m[3:]) for m in merges)]
    backend = Tokenizer(models.BPE(vocab, pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def write_model(path, vocab):
    """Write a model of one block whose weights are zero: enough for llama.cpp to tokenize."""
    rows, config = len(vocab.tokens), LlamaConfig(
        vocab_size=len(vocab.tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip
    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch.name)
    arch.describe(writer)
    vocab.describe(writer)
    shapes = {"token_embd": (rows, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.ffn_{n}": (32, 32) for n in ("gate", "up", "down")}
    for name, shape in shapes.items():
        dtype = torch.float32 if len(shape) == 1 else torch.float16
        writer.add_tensor(f"{name}.weight", torch.zeros(shape, dtype=dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2", "qwen35", "starcoder", "gpt-2"])
def test_a_real_vocabulary_is_written_as_llama_cpp_has_it_and_tokenizes_as_hugging_face_does(
    name, vocabularies, expected, keys, llama_cpp, tmp_path
):
    key = keys(vocabularies / f"ggml-vocab-{name}.gguf")
    tokenizer = as_hugging_face(key)
    rows = len(key["tokenizer.ggml.tokens"])
    found = vocabulary(tokenizer, rows, LlamaConfig())
    assert found.tokens == key["tokenizer.ggml.tokens"]
    padding = [i for i, t in enumerate(found.tokens) if t.startswith("[PAD")]
    assert all(found.types[i] == gguf.TokenType.UNUSED for i in padding)
    wanted = [t for i, t in enumerate(key["tokenizer.ggml.token_type"]) if i not in set(padding)]
    assert [t for i, t in enumerate(found.types) if i not in set(padding)] == wanted
    assert not found.warnings and found.model == key["tokenizer.ggml.model"]
    for special in ("bos", "eos"):
        assert found.special[special] == key[f"tokenizer.ggml.{special}_token_id"]
    assert found.add_bos == key.get("tokenizer.ggml.add_bos_token", False)
    if found.model == "gpt2":
        assert found.pre == FAMILIES[name][2] and found.merges == key["tokenizer.ggml.merges"]
    else:
        assert found.add_space_prefix
        assert_same_order(found, key["tokenizer.ggml.scores"])
    texts = expected(name)
    assert len(texts) >= 47
    for text, ids in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
    write_model(tmp_path / "model.gguf", found)
    running = llama_cpp(tmp_path / "model.gguf")
    for text, ids in texts:
        assert running.tokenize(text, special=False) == ids, text
    control = found.tokens[found.special["eos"]]
    for text in (*AWKWARD, f"a{control}b", f"{control}{control}\n"):
        assert running.tokenize(text) == tokenizer(text).input_ids, text


def assert_same_order(found, scores):
    """The pieces that merges make come in the order of sentencepiece's scores, equal ones in any."""
    made = [i for i, s in enumerate(found.scores) if found.types[i] == 1 and s > -1e6]
    assert len(made) > 20000
    theirs = [scores[i] for i in sorted(made, key=lambda i: -found.scores[i])]
    assert theirs == sorted(theirs, reverse=True)


def test_the_probe_separates_every_pair_of_rules_and_finds_tekken():
    cut = [[p for p, _ in r.cut.pre_tokenize_str(PROBE)] for r in rules() if r.name != "dbrx"]  # cuts as llama-bpe
    assert all(a != b for i, a in enumerate(cut) for b in cut[:i])
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    assert byte_level_name(tiny(byte_level(tekken)), True) == "tekken"
    assert byte_level_name(tiny(byte_level(LLAMA3)), False) == "dbrx"
    assert byte_level_name(tiny(byte_level(QWEN2), normalizers.NFC()), False) == "qwen2"
    assert pieces(tiny(None), "as it is") == ["as it is"]


def tiny(cut, normal=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.normalizer = cut, normal
    return backend


@pytest.mark.parametrize(
    ("backend", "ignore", "message"),
    [
        (tiny(byte_level(r"\p{N}{1,2}|[^\p{N}]+")), False, "a way that llmq does not know"),
        (tiny(pre_tokenizers.ByteLevel(True)), False, "--format gguf:pre=NAME"),
        (tiny(byte_level(QWEN2), normalizers.Lowercase()), False, "normalizer"),
        (tiny(byte_level(QWEN2), normalizers.NFKC()), False, "normalizer"),
        (tiny(byte_level(QWEN2)), True, "ignore_merges false"),
        (tiny(None), False, "a way that llmq does not know"),
    ],
)
def test_a_rule_that_llama_cpp_does_not_have_is_refused_never_guessed(backend, ignore, message):
    with pytest.raises(LlmqError, match=message):
        byte_level_name(backend, ignore)


def trained(tokenizer_bos):
    return tokenizer_bos, LlamaConfig(bos_token_id=0, eos_token_id=1)


def test_rows_beyond_the_vocabulary_are_padding_and_too_few_rows_are_refused(tokenizer_bos):
    tokenizer, config = trained(tokenizer_bos)
    n = len(tokenizer)
    found = vocabulary(tokenizer, n + 3, config)
    assert found.tokens[n:] == [f"[PAD{i}]" for i in range(n, n + 3)] and found.types[n:] == [5, 5, 5]
    assert found.add_bos and not found.add_eos and found.special["bos"] == 0 and "message" in found.chat_template
    with pytest.raises(LlmqError, match="the embedding"):
        vocabulary(tokenizer, n - 1, config)


def test_a_token_that_transformers_adds_beyond_the_embedding_is_left_out(tokenizer_plain, tmp_path):
    """Of model_type qwen2 it adds <|endoftext|> to a vocabulary that has no such token."""
    tokenizer_plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = tokenizer_of(tmp_path)
    assert max(loaded.get_vocab().values()) == 320
    found, plain = (vocabulary(t, 320, LlamaConfig()) for t in (loaded, tokenizer_plain))
    assert found.tokens == plain.tokens and found.types == plain.types and found.merges == plain.merges
    assert found.special == {"bos": 0, "eos": 1} and "<|endoftext|>, which transformers adds" in found.warnings[-1]
    larger = copy.deepcopy(tokenizer_plain)
    larger.add_tokens(["of its own"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(LlmqError, match="ids up to 32[01], the embedding 320 rows"):
        vocabulary(tokenizer_of(tmp_path), 320, LlamaConfig())


def test_what_stands_around_a_text_is_read_from_behaviour(tokenizer_plain):
    assert not vocabulary(tokenizer_plain, 320, LlamaConfig()).add_bos
    backend = Tokenizer.from_str(tokenizer_plain.backend_tokenizer.to_str())
    around = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    both = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    found = vocabulary(both, 320, LlamaConfig())
    assert found.add_bos and found.add_eos
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=around)
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    with pytest.raises(LlmqError, match="puts ids"):
        vocabulary(odd, 320, LlamaConfig())


def test_a_user_defined_token_is_no_control_token_and_stripping_is_said(tokenizer_plain):
    backend = Tokenizer.from_str(tokenizer_plain.backend_tokenizer.to_str())
    n = backend.get_vocab_size()
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<|fim|>", normalized=False)])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    found = vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), n + 3, LlamaConfig())
    assert found.types[n:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert found.warnings == ["the tokenizer strips spaces beside '<mask>', llama.cpp does not"]


def test_sentencepiece_that_does_more_than_show_spaces_is_refused():
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, SPACE: 257, "a": 258}
    backend = sentencepiece(vocab, [0.0] * 259)
    backend.normalizer = normalizers.Sequence([backend.normalizer, normalizers.Lowercase()])
    with pytest.raises(LlmqError, match="byte fallback"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 259, LlamaConfig())


def test_another_kind_of_tokenizer_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(LlmqError, match="WordLevel"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 2, LlamaConfig())


def test_special_ids_are_rows_of_the_embedding(tokenizer_plain):
    def special(**ids):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_plain.backend_tokenizer)
        return vocabulary(tokenizer, 320, LlamaConfig(bos_token_id=None, eos_token_id=None, **ids)).special

    assert special(pad_token_id=-1) == {}  # as Llama's first configs said that there is none
    assert special(pad_token_id=319) == {"pad": 319}
    with pytest.raises(LlmqError, match="pad_token_id is 320, no row of the embedding, which has 320"):
        special(pad_token_id=320)


@pytest.mark.parametrize("key", ["dropout", "continuing_subword_prefix", "end_of_word_suffix"])
def test_a_merging_rule_that_llama_cpp_does_not_have_is_refused(key):
    model = models.BPE({"a": 0}, [], **{key: 0.1 if key == "dropout" else "##"})
    with pytest.raises(LlmqError, match=f"sets {key}, which llama.cpp does not know"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), 1, LlamaConfig())


def test_two_ids_of_one_text_are_refused_however_many_there_are(tokenizer_plain):
    backend = Tokenizer.from_str(tokenizer_plain.backend_tokenizer.to_str())
    backend.add_tokens([f"[PAD{2**16}]"])
    with pytest.raises(LlmqError, match=r"2 ids of the tokenizer have the text '\[PAD65536\]'"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 2**16 + 1, LlamaConfig())


def test_what_llama_cpp_does_with_templates_and_single_words_is_said(tokenizer_plain, tmp_path, llama_cpp):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_plain.backend_tokenizer.to_str()))
    tokenizer.chat_template = {"default": "D:{{ messages[0].content }}", "tool_use": "T:{{ messages[0].content }}"}
    found = vocabulary(tokenizer, 320, LlamaConfig())
    assert found.warnings == []
    write_model(tmp_path / "model.gguf", found)
    assert llama_cpp(tmp_path / "model.gguf").chat("hi") == "D:hi"
    tokenizer.chat_template = {"rag": "", "tool_use": ""}
    tokenizer.backend_tokenizer.add_tokens([AddedToken("word", single_word=True)])
    alone, templates = vocabulary(tokenizer, 321, LlamaConfig()).warnings
    assert "'word' as a word of its own" in alone and "templates (rag, tool_use) is called default" in templates


@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer"])
def test_a_regular_expression_that_runs_away_is_one_line(where, tokenizer_plain, tmp_path, capfd):
    backend = Tokenizer.from_str(tokenizer_plain.backend_tokenizer.to_str())
    pattern = Regex(r"(\w+\s?)+$|(.+)+x")
    split = pre_tokenizers.Split(pattern, "isolated")
    setattr(backend, where, split if where == "pre_tokenizer" else normalizers.Replace(pattern, "x"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    begun = time.process_time()
    with pytest.raises(LlmqError, match="the tokenizer(, cutting a text, takes| cannot cut a text: .*retry-limit)"):
        load_tokenizer(tmp_path)
    assert time.process_time() - begun < 5 and capfd.readouterr().err == ""
