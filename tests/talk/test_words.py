"""Text out of tokens: the same as all at once, never half a character; a stop string ends it wherever it is split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.talk.words import Decoded, until


@pytest.mark.parametrize("text", ["The first city", "é🚀日本語 ok", "  two  spaces\n", "\ufffd"])
@pytest.mark.parametrize("before", ["", "Once upon a time é"])
def test_pieces_join_to_what_is_decoded_at_once(tokenizer_plain, text, before):
    def decode(ids):
        return tokenizer_plain.decode(ids, skip_special_tokens=True)

    ids = tokenizer_plain(text)["input_ids"]
    words = Decoded(decode, tokenizer_plain(before)["input_ids"] if before else ())
    pieces = [words.add(i) for i in ids]
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text
    assert "".join([*pieces, words.add(None)]) == text


def test_halves_without_end_are_given_out_and_cost_the_same_each():
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return bytes(ids).decode(errors="replace")

    words = Decoded(decode)
    pieces = [words.add(0x80) for _ in range(200)]
    assert "".join(pieces) == 200 * "\ufffd" and max(asked) <= 24


def test_half_a_character_waits_and_ends_as_it_is(tokenizer_plain):
    ids = tokenizer_plain("é")["input_ids"]
    words = Decoded(tokenizer_plain.decode)
    assert len(ids) == 2 and words.add(ids[0]) == "" and words.add(None) == "\ufffd"


def test_a_first_word_keeps_its_space():
    """Sentencepiece has no space in front of the first token of what it decodes."""

    def decode(ids):
        return "".join([" Paris", " is"][i] for i in ids).removeprefix(" ")

    assert Decoded(decode, [1]).add(0) == " Paris" and Decoded(decode).add(0) == "Paris"


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), st.data())
def test_a_stop_string_ends_the_text_however_it_is_cut(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [at for s in stop if (at := text.find(s)) >= 0]
    given_out = list(until(pieces, stop))
    assert all(given_out)
    said = "".join(given_out)
    # of two that could end it, the one that is seen first does: with pieces of a letter that is the one that ends first
    assert said == text if not found else any(said + s == text[: len(said) + len(s)] for s in stop)
    assert not any(s in said for s in stop)


def test_nothing_is_asked_for_behind_a_stop_string():
    def pieces():
        yield from ("a", "b", "c")
        raise AssertionError

    assert list(until(pieces(), ["bc"])) == ["a"]
