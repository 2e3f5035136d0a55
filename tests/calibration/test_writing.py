"""Text that the model writes itself: seeded, from its own distribution, refused where it does not fit or pay."""

from __future__ import annotations

import pytest
import torch

from llmq import calibration
from llmq.calibration import Writer, tokens, writing
from llmq.types import LlmqError


@pytest.mark.parametrize("bos", [True, False])
def test_self_writes_full_seeded_sequences(request, tiny_llama, bos, monkeypatch):
    tokenizer = request.getfixturevalue("tokenizer_bos" if bos else "tokenizer_plain")
    monkeypatch.setattr(writing, "WRITE_BATCH", 4)  # 10 sequences: three batches, the last of 2
    got, again, other = (tokens("self", tokenizer, 10, 24, seed=seed, writer=Writer(tiny_llama)) for seed in (0, 0, 1))
    assert (got.shape, got.dtype) == ((10, 24), torch.int64)
    assert torch.equal(got, again)
    assert not torch.equal(got, other)
    if bos:
        assert (got[:, 0] == 0).all()
        assert (got == 0).sum() == 10


def test_self_says_how_it_goes_on(tiny_llama, tokenizer_bos, monkeypatch):
    monkeypatch.setattr(writing, "WRITE_BATCH", 4)
    told = []
    tokens("self", tokenizer_bos, 6, 24, seed=0, writer=Writer(tiny_llama, lambda *said: told.append(said)))
    assert told == [(32, 144), (64, 144), (96, 144), (112, 144), (128, 144), (144, 144)]


def test_self_samples_from_the_models_distribution(tiny_llama, tokenizer_bos):
    """2000 second tokens follow p(. | BOS) without BOS, as closely as sampling noise allows; BOS itself is likely."""
    model = tiny_llama(initializer_range=0.4)
    with torch.no_grad():
        state = model.model(torch.tensor([[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[0] = 10 * state / state.square().sum()  # a logit of 10
        logits = model.lm_head(state)
    assert logits.softmax(-1)[0] > 0.1
    logits[0] = -torch.inf
    p = logits.softmax(-1)
    got = tokens("self", tokenizer_bos, 2000, 2, seed=0, writer=Writer(lambda: model))
    seen = torch.bincount(got[:, 1], minlength=320) / 2000
    noise = (p * (1 - p) / 2000).sqrt().sum() / 2
    assert seen[0] == 0
    assert (seen - p).abs().sum() / 2 < 1.2 * noise < 0.2
    assert (p - 1 / 320).abs().sum() / 2 > 0.3  # far from uniform, so that the line above says something


def test_self_starts_anywhere_but_at_special_tokens(tiny_llama, tokenizer_plain):
    first = tokens("self", tokenizer_plain, 2000, 2, seed=0, writer=Writer(tiny_llama))[:, 0]
    assert len(set(first.tolist())) > 300
    assert not set(first.tolist()) & set(tokenizer_plain.all_special_ids)


def test_self_never_writes_padding_rows(tiny_llama, tokenizer_bos):
    """An embedding larger than the vocabulary has rows that no tokenizer knows."""
    got = tokens("self", tokenizer_bos, 8, 32, seed=0, writer=Writer(lambda: tiny_llama(vocab_size=2000)))
    assert got.max() < len(tokenizer_bos)


def test_self_is_refused_where_it_does_not_pay(tiny_llama, tokenizer_bos, monkeypatch):
    monkeypatch.setattr(writing, "WRITE_SECONDS", 0)
    monkeypatch.setattr(writing, "WRITE_FACTOR", 0)
    with pytest.raises(LlmqError, match=r"would take about \d+ min to write, \d+ times .* --calib FILE"):
        tokens("self", tokenizer_bos, 8, 32, seed=0, writer=Writer(tiny_llama))
    monkeypatch.setattr(writing, "WRITE_FACTOR", 1e9)
    assert tokens("self", tokenizer_bos, 8, 32, seed=0, writer=Writer(tiny_llama)).shape == (8, 32)


def test_self_is_refused_where_it_does_not_fit(monkeypatch):
    class Free:
        available = 5 * 10**9

    monkeypatch.setattr(writing.psutil, "virtual_memory", Free)
    calibration.check_memory(10**9)  # and 1.07 GB of cache
    with pytest.raises(LlmqError, match=r"6.0 GB of which 5.0 GB are free: give a text file"):
        calibration.check_memory(3 * 10**9)


def test_self_names_a_broken_model(tiny_llama, tokenizer_bos):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(LlmqError, match="the model writes NaN"):
        tokens("self", tokenizer_bos, 2, 8, seed=0, writer=Writer(lambda: model))
