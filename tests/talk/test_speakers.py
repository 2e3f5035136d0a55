"""Both ways to generate: what transformers' `generate` gives, a cache that goes on, answers that end or are ended."""

import json
import socket
import subprocess
import sys

import pytest
import torch
from _tiny import CHAT_TEMPLATE

import llmq
from llmq.talk import in_torch
from llmq.talk.speaker import Sampling, opened

HELLO = [{"role": "user", "content": "The first city"}]


@pytest.fixture
def folder(tiny_checkpoint):
    return tiny_checkpoint()


@pytest.fixture
def speaker(folder):
    with opened(str(folder), "cpu") as found:
        assert found.name == folder.name  # not where it lies
        yield found


def test_it_says_what_generate_does(speaker, folder):
    ids = speaker.encode("The first city")
    answer = speaker.answer(ids, Sampling(12, temperature=0))
    text = "".join(answer)
    model = llmq.load(folder, device="cpu")
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0]
    tokenizer = llmq.load_tokenizer(folder)
    assert tokenizer.decode(out, skip_special_tokens=True) == "The first city" + text
    assert answer.tokens == len(out) - len(ids) and answer.prompt_tokens == len(ids)
    assert answer.finish == ("stop" if int(out[-1]) == 1 else "length")


def test_a_turn_that_goes_on_is_computed_from_where_the_last_one_ended(speaker, monkeypatch):
    def turn(ids):
        return "".join(speaker.answer(ids, Sampling(6, temperature=0)))

    fed = []
    before = type(speaker._model).forward
    monkeypatch.setattr(
        type(speaker._model),
        "forward",
        lambda self, input_ids=None, **kw: fed.append(input_ids.shape[1]) or before(self, input_ids=input_ids, **kw),
    )
    ids = speaker.encode("The first city")
    turn(ids)
    assert fed[0] == len(ids)
    longer = [*speaker._held, *speaker.encode("and the war")]
    fed.clear()
    warm = turn(longer)
    assert fed[0] == len(speaker.encode("and the war"))
    speaker._cache = None
    assert turn(longer) == warm
    fed.clear()
    turn(ids)  # another chat: nothing of the last one
    assert fed[0] == len(ids)


def test_an_answer_that_is_closed_is_computed_no_further_and_the_next_one_is_right(speaker):
    ids = speaker.encode("The first city")
    whole = list(speaker.answer(ids, Sampling(20, temperature=0)))
    speaker._cache = None
    answer = speaker.answer(ids, Sampling(20, temperature=0))
    pieces = iter(answer)
    some = [next(pieces) for _ in range(3)]
    answer.close()
    assert answer.tokens < 20 and answer.finish is None and some == whole[:3]
    assert list(speaker.answer(ids, Sampling(20, temperature=0))) == whole


def test_an_interrupt_within_a_forward_leaves_no_cache(speaker, monkeypatch):
    def forward(self, *args, **kw):
        raise KeyboardInterrupt

    ids = speaker.encode("The first city")
    whole = list(speaker.answer(ids, Sampling(4, temperature=0)))
    monkeypatch.setattr(type(speaker._model.model.layers[1]), "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        list(speaker.answer(ids, Sampling(4, temperature=0)))
    monkeypatch.undo()
    assert list(speaker.answer(ids, Sampling(4, temperature=0))) == whole


def test_a_seed_repeats_and_stop_strings_end(speaker):
    ids = speaker.encode("The first city")
    drawn = ["".join(speaker.answer(ids, Sampling(12, 1.0, seed=s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    text = drawn[0]
    answer = speaker.answer(ids, Sampling(12, 1.0, seed=1, stop=[text[3:5]]))
    assert "".join(answer) == text[: text.index(text[3:5])] and answer.finish == "stop"
    last = speaker.answer(ids, Sampling(12, 1.0, seed=1, stop=[text[-1:]]))  # with the last token that is wanted
    assert "".join(last) == text[: text.index(text[-1:])] and last.finish == "stop"


def test_an_answer_that_nobody_reads_on_leaves_its_cache_to_nobody(speaker):
    ids = speaker.encode("The first city")
    whole = list(speaker.answer(ids, Sampling(6, temperature=0)))
    longer = [*speaker._held, *ids]
    wanted = list(speaker.answer(longer, Sampling(6, temperature=0)))
    list(speaker.answer(ids, Sampling(6, temperature=0)))
    left = iter(speaker.answer(longer, Sampling(6, temperature=0)))  # takes the cache, and waits
    next(left)
    assert list(speaker.answer(longer, Sampling(6, temperature=0))) == wanted and whole


def test_chats_go_through_the_template(speaker, folder):
    ids = speaker.prompt(HELLO)
    text = "<s><user>The first city</user>\n"
    assert ids == llmq.load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    speaker.__exit__(None, None, None)
    speaker._tokenizer.chat_template = "{{ 'a' * 2**31 }}"  # in a child that may take 2**30 bytes
    with pytest.raises(llmq.LlmqError, match="its chat template refuses these messages: MemoryError"):
        speaker.prompt(HELLO)
    speaker._tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(llmq.LlmqError, match=r"its chat template refuses these messages.*only users"):
        speaker.prompt(HELLO)
    speaker._tokenizer.chat_template = CHAT_TEMPLATE
    assert speaker.prompt(HELLO) == ids


def test_what_cannot_be_is_refused(speaker, tiny_checkpoint):
    with pytest.raises(llmq.LlmqError, match="the prompt is empty"):
        speaker.answer([], Sampling(1))
    with pytest.raises(llmq.LlmqError, match="the prompt has 512 tokens, and .* takes 512 in all"):
        speaker.answer([5] * 512, Sampling(1))
    answer = speaker.answer([5] * 510, Sampling(100, temperature=0))
    list(answer)
    assert answer.tokens <= 2
    for given in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 2.0}, {"seed": -1}):
        with pytest.raises(llmq.LlmqError, match=f"{next(iter(given))} is"):
            Sampling(**({"max_new_tokens": 1} | given))
    folder = tiny_checkpoint()
    (folder / "chat_template.jinja").unlink()
    with opened(str(folder), "cpu") as base:
        assert not base.chats
        with pytest.raises(llmq.LlmqError, match="has no chat template"):
            base.prompt(HELLO)
    with pytest.raises(llmq.LlmqError, match="bits of a cache are 8 or 4, not 3"):
        opened(str(folder), "cpu", kv_bits=3)


def test_the_checkpoints_own_settings_hold_where_nothing_is_said(tiny_checkpoint):
    folder = tiny_checkpoint()
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 7]}))
    speaker = in_torch.InTorch(str(folder), "cpu")
    assert speaker._choosing(Sampling(1)) == {"do_sample": True}
    assert speaker._choosing(Sampling(1, 0)) == speaker._choosing(Sampling(1, 1e-300))
    assert speaker._choosing(Sampling(1, 1e-300))["do_sample"] is False
    assert speaker._choosing(Sampling(1, 0.5)) == {"do_sample": True, "temperature": 0.5}
    assert speaker._ends() == [1, 7]


@pytest.fixture
def gguf(tiny_checkpoint, tmp_path, llama_cpp):
    llmq.quantize(tiny_checkpoint(), tmp_path / "m.gguf", type="Q8_0", method="rtn", warn=lambda _: None)
    return tmp_path / "m.gguf"


def test_a_gguf_file_speaks_in_llama_cpp(gguf, llama_cpp):
    with opened(str(gguf), context=128) as speaker:
        assert speaker.chats and speaker.context == 128
        ids = speaker.prompt(HELLO)
        assert ids[:1] == [0]
        answer = speaker.answer(ids, Sampling(10, temperature=0))
        text = "".join(answer)
        assert text and answer.tokens == 10 and answer.finish in ("length", "stop")
        again = speaker.answer(ids, Sampling(10, temperature=0))
        first = next(iter(again))
        again.close()
        assert text.startswith(first)
        assert "".join(speaker.answer(ids, Sampling(10, temperature=0))) == text
        drawn = ["".join(speaker.answer(ids, Sampling(8, 1.0, seed=s))) for s in (1, 1)]
        assert drawn[0] == drawn[1]
    assert text == llama_cpp(gguf)._ask("/completion", prompt=ids, n_predict=10, temperature=0)["content"]


def test_the_cache_of_a_gguf_file_is_not_ours(gguf):
    with pytest.raises(llmq.LlmqError, match="--kv-bits is for checkpoints that run in torch"):
        opened(str(gguf), kv_bits=8)


def test_a_gguf_file_that_is_left_at_once_is_left(gguf):
    leave = "import sys; from llmq.talk.speaker import opened\nfor _ in range(3): opened(sys.argv[1], context=64)"
    ended = subprocess.run([sys.executable, "-c", leave, gguf], timeout=120, check=False)  # it waited for ever
    assert ended.returncode == 0


def test_no_proxy_hears_what_a_gguf_file_is_asked(gguf, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with opened(str(gguf), context=64) as speaker:
            assert speaker.encode("The first city")
    for context in (0, -1, 2**31):
        with pytest.raises(llmq.LlmqError, match=f"--context is {context}; it must be at least 1"):
            opened(str(gguf), context=context)


def test_gguf_without_xllamacpp_says_what_to_install(gguf, monkeypatch):
    monkeypatch.setattr("llmq.extras.find_spec", lambda name: None)
    with pytest.raises(
        llmq.LlmqError, match=r"xllamacpp, which is not installed: pip install 'llmq-quant\[llama-cpp\]'"
    ):
        opened(str(gguf))
