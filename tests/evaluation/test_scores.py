from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Gemma2Config, Gemma2ForCausalLM

from llmq.evaluation import scores
from llmq.evaluation.scores import evaluate
from llmq.evaluation.windows import articles, detokenise, find_convention
from llmq.types import LlmqError

ROOT = Path(__file__).parents[2]


@torch.no_grad()
def naive(model, ids: list[int]) -> torch.Tensor:
    """Float64 log-probabilities of every next token, [T - 1, V], one prefix at a time where that is cheap."""
    return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def naive_nll(model, ids: list[int], first: int) -> list[float]:
    """-log q of ids[first:], each read from the model's prediction after ids[:t]."""
    with torch.no_grad():
        return [
            -model(torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)[ids[t]].item()
            for t in range(first, len(ids))
        ]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("name", "window", "first"), [("gptq", 24, 1), ("llama.cpp", 24, 13), ("llama.cpp", 25, 13)])
def test_disjoint_windows_equal_a_naive_loop(request, tiny_llama, prose, bos, name, window, first):
    model, tokenizer = tiny_llama(), request.getfixturevalue("tokenizer_bos" if bos else "tokenizer_plain")
    text = prose(24)
    ids = tokenizer(text)["input_ids"]  # BOS comes first exactly where the tokenizer adds it
    count = len(ids) // window
    assert count > 1
    nll = []
    for i in range(count):
        piece = ids[i * window : (i + 1) * window]
        nll += naive_nll(model, [0, *piece[1:]] if bos and name == "llama.cpp" else piece, first)
    got = evaluate(model, tokenizer, text, find_convention(name, window))
    assert got.tokens == got.count == len(nll) == count * (window - first)
    assert got.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    error = torch.tensor(nll).std() / math.sqrt(len(nll))
    assert got.standard_error == pytest.approx(got.perplexity * error.item(), rel=1e-4)
    assert (got.convention, got.window, got.unit, got.kl_mean) == (name, window, "token", None)


def test_llama_cpp_scores_255_of_512(tiny_llama, tokenizer_bos, prose):
    got = evaluate(tiny_llama(), tokenizer_bos, prose(800), find_convention("llama.cpp"), windows=2)
    assert got.tokens == 2 * 255


def test_lm_eval_equals_a_naive_loop(tiny_llama, tokenizer_bos, prose):
    """Every token scored once, from up to `window` tokens before it; words and bytes of the text as it was given."""
    model = tiny_llama()
    text = f" \n = One = \n \n {prose(30)} = = Part = = \n a 5 @-@ year , plan . \n = Two = \n \n {prose(12, seed=1)}"
    pages = articles(text)
    assert [p.strip().split("\n")[0].strip() for p in pages] == ["= One =", "= Two ="]
    L, total, words = 24, 0.0, 0
    for page in pages:
        ids = [0, *tokenizer_bos(detokenise(page), add_special_tokens=False)["input_ids"]]
        starts = [0] + [min(s, len(ids) - 1 - L) for s in range(L, len(ids) - 1, L)]
        done = 1
        for start in starts:
            piece = ids[start : start + L + 1]
            total += sum(naive_nll(model, piece, done - start))
            done = start + len(piece)
        assert done == len(ids)
        words += len(re.split(r"\s+", page))
    got = evaluate(model, tokenizer_bos, text, find_convention("lm-eval", L))
    assert (got.unit, got.count) == ("word", words)
    assert got.perplexity == pytest.approx(math.exp(total / words), rel=1e-5)
    assert got.byte_perplexity == pytest.approx(math.exp(total / sum(len(p.encode()) for p in pages)), rel=1e-5)
    assert evaluate(model, tokenizer_bos, text, find_convention("lm-eval")).window == 512  # what the model reads
    assert evaluate(model, tokenizer_bos, text, find_convention("lm-eval", L), windows=1).count < words


def test_a_model_equals_itself(tiny_llama, tokenizer_bos, prose):
    model = tiny_llama()
    got = evaluate(model, tokenizer_bos, prose(200), find_convention("gptq", 64), baseline=tiny_llama())
    assert (got.kl_mean, got.kl_p999, got.kl_standard_error, got.top1) == (0, 0, 0, 1)
    assert got.baseline_perplexity == got.perplexity


def test_divergence_equals_its_definition(tiny_llama, tokenizer_bos, prose):
    model, baseline, text = tiny_llama(seed=1), tiny_llama(seed=0), prose(500)
    got = evaluate(model, tokenizer_bos, text, find_convention("gptq", 300), baseline=baseline)  # five chunks a window
    ids = tokenizer_bos(text)["input_ids"]
    log_q, log_p = (
        torch.cat([naive(m, ids[i : i + 300]) for i in range(0, len(ids) - 299, 300)]) for m in (model, baseline)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert len(kl) == got.tokens > 300
    assert got.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert got.kl_p999 == pytest.approx(kl.sort().values[-(got.tokens // 1000) - 1].item(), rel=1e-5)
    assert got.kl_standard_error == pytest.approx(kl.std().item() / math.sqrt(len(kl)), rel=1e-4)
    assert got.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    assert got.baseline_perplexity == evaluate(baseline, tokenizer_bos, text, find_convention("gptq", 300)).perplexity
    reverse = evaluate(baseline, tokenizer_bos, text, find_convention("gptq", 300), baseline=model)
    assert abs(reverse.kl_mean - got.kl_mean) > 1e-3  # it is not symmetric: the direction matters
    low, high = got.kl_interval
    assert low < got.kl_mean < high and got.kl_mean < got.kl_p99 < got.kl_p999


def test_divergence_by_position_and_by_class_part_the_same_tokens(tiny_llama, tokenizer_bos, prose):
    text = prose(500)
    got = evaluate(tiny_llama(1), tokenizer_bos, text, find_convention("gptq", 300), baseline=tiny_llama(0))
    ids = tokenizer_bos(text)["input_ids"]
    log_q, log_p = (
        torch.stack([naive(m, ids[i : i + 300]) for i in range(0, len(ids) - 299, 300)])
        for m in (tiny_llama(1), tiny_llama(0))
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [windows, 299]: position 1 first
    firsts = [first for first, _ in got.kl_by_position]
    assert firsts[0] == 1 and firsts == sorted(set(firsts)) and 8 < len(firsts) <= scores.BUCKETS
    for (first, mean), end in zip(got.kl_by_position, [*firsts[1:], 300], strict=True):
        assert mean == pytest.approx(kl[:, first - 1 : end - 1].mean().item(), rel=1e-5)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).flatten()
    named = [c for i in range(len(kl)) for c in _named(ids[i * 300 : (i + 1) * 300], tokenizer_bos)]
    assert set(got.classes) == set(named) and len(got.classes) > 3
    for name, of in got.classes.items():
        kept = torch.tensor([c == name for c in named])
        assert of["tokens"] == int(kept.sum())
        assert of["kl_mean"] == pytest.approx(kl.flatten()[kept].mean().item(), rel=1e-5)
        assert of["top1"] == pytest.approx(agree[kept].double().mean().item())


def _named(ids: list[int], tokenizer) -> list[str]:
    """The class of each token of the tiny tokenizer after the first, by the characters of prose alone."""
    texts = [tokenizer.decode([i]) for i in ids]
    found = []
    for before, text in itertools.pairwise(texts):
        if not text.strip():
            found.append("whitespace")
        elif text == ".":
            found.append("punctuation")
        else:
            found.append("word pieces" if before[-1].isalpha() and text[0] != " " else "words")
    return found


@pytest.mark.parametrize("cap", [None, 2.0])
def test_logits_capped_after_the_head_are_honoured(tokenizer_bos, prose, cap):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=cap, initializer_range=0.5,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    text = prose(40)
    ids = tokenizer_bos(text)["input_ids"][:64]
    got = evaluate(model, tokenizer_bos, text, find_convention("gptq", 64), windows=1)
    want = -naive(model, ids).gather(1, torch.tensor(ids[1:])[:, None]).mean()
    assert got.perplexity == pytest.approx(math.exp(want), rel=1e-4)
    assert (scores.Predictor(model, "").head is None) == (cap is not None)


def test_plain_text_is_not_detokenised(tiny_llama, tokenizer_bos):
    """Undoing a tokenisation that is not there would join words: the players ' team."""
    plain = "He said ' yes ' . Then nothing ."
    ids = [0, *tokenizer_bos(plain, add_special_tokens=False)["input_ids"]]
    got = evaluate(tiny_llama(), tokenizer_bos, plain, find_convention("lm-eval"))
    assert got.tokens == len(ids) - 1 > len(tokenizer_bos(detokenise(plain), add_special_tokens=False)["input_ids"])


def test_progress_and_limit(tiny_llama, tokenizer_bos, prose):
    seen = []
    got = evaluate(
        tiny_llama(), tokenizer_bos, prose(200), find_convention("gptq", 32), windows=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert got.tokens == 3 * 31


def test_errors_are_one_line(tiny_llama, tokenizer_bos, prose):
    model, how = tiny_llama(), find_convention("gptq", 64)

    def refuses(match: str, *args, **kwargs) -> None:
        with pytest.raises(LlmqError, match=match) as e:
            evaluate(*args, **kwargs)
        assert "\n" not in str(e.value)

    n = len(tokenizer_bos("the of")["input_ids"])
    refuses(f"the text has {n} tokens, one window needs 64", model, tokenizer_bos, "the of", how)
    refuses("text is empty", model, tokenizer_bos, " \n", find_convention("lm-eval"))
    refuses("reads 512 tokens, not a window of 2048", model, tokenizer_bos, prose(9), find_convention("gptq"))
    refuses("1 window or more", model, tokenizer_bos, prose(99), how, windows=0)
    refuses("baseline has 256", model, tokenizer_bos, prose(99), how, baseline=tiny_llama(vocab_size=256))


def test_broken_logits_name_the_window(tiny_llama, tokenizer_bos, prose):
    """A NaN embedding breaks the first window that holds its token, for the model as for the baseline."""
    text, how = prose(200), find_convention("gptq", 32)
    ids = tokenizer_bos(text)["input_ids"]
    rare = next(t for t in ids[64:96] if t not in ids[:64] and t not in range(8))
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[rare] = math.nan
    with pytest.raises(LlmqError, match=r"window 3 of \d+: the model gives NaN"):
        evaluate(broken, tokenizer_bos, text, how)
    with pytest.raises(LlmqError, match=r"window 3 of \d+: the baseline gives NaN"):
        evaluate(tiny_llama(), tokenizer_bos, text, how, baseline=broken)


def test_table_and_json(tiny_llama, tokenizer_bos, prose):
    got = evaluate(tiny_llama(1), tokenizer_bos, prose(99), find_convention("gptq", 64), baseline=tiny_llama(0))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(scores.table({"a": got, "b": dataclasses.replace(got, perplexity=math.inf)}))
    shown = console.export_text()
    for cell in (f"{got.perplexity:.3f}", f"{got.baseline_perplexity:.3f}", f"{got.kl_mean:.5f}", f"{got.top1:.2%}"):
        assert cell in shown
    assert json.loads(json.dumps(got.to_json())) == dataclasses.asdict(got)
    assert dataclasses.replace(got, perplexity=math.inf).to_json()["perplexity"] is None


def test_scripts(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Both scripts run as a user runs them, on the sample text, and agree."""
    a, b = tiny_checkpoint(seed=0), tiny_checkpoint(seed=1)
    monkeypatch.syspath_prepend(str(ROOT / "eval"))

    def run(script: str, *args: object) -> None:
        monkeypatch.setattr("sys.argv", [script, *map(str, args), "--window", "64", "--windows", "2"])
        runpy.run_path(str(ROOT / "eval" / script), run_name="__main__")

    run("perplexity.py", b, "--baseline", a, "--json", tmp_path / "p.json")
    run("kl.py", a, b, a, "--json", tmp_path / "k.json")
    shown = capsys.readouterr().out
    assert "KL 99.9 %" in shown
    assert "perplexity per token" in shown
    p, k = (json.loads((tmp_path / f).read_text()) for f in ("p.json", "k.json"))
    assert p[str(b)]["tokens"] == 2 * 63
    assert p[str(b)] | {"seconds": 0} == k[str(b)] | {"seconds": 0}
    assert k[str(a)]["kl_mean"] == 0 < k[str(b)]["kl_mean"]
    with pytest.raises(SystemExit, match=r"^error: .*none is not a folder"):
        run("perplexity.py", tmp_path / "none")


def test_a_quantized_cache_costs_more_the_fewer_its_bits(tiny_llama, tokenizer_bos, prose):
    model, text, how = tiny_llama(), prose(400), find_convention("gptq", 256)
    rows = {
        bits: evaluate(model, tokenizer_bos, text, how, baseline=tiny_llama(), windows=1, kv_bits=bits)
        for bits in (None, 8, 4, 2)
    }
    assert [r.kv_bits for r in rows.values()] == [None, 8, 4, 2]
    assert rows[None].kl_mean == 0
    kl = {bits: row.kl_mean for bits, row in rows.items()}
    assert 0 < kl[8] < 1e-3
    assert kl[4] > 10 * kl[8]
    assert kl[2] > 10 * kl[4]  # much worse: the entries that attention reads are the quantized ones
    assert rows[2].perplexity > 1.01 * rows[8].perplexity


def test_feeding_a_float_cache_in_pieces_changes_nothing(tiny_llama, tokenizer_bos, prose, monkeypatch):
    from transformers import DynamicCache

    from llmq.integrations.cache import QuantizedCache

    monkeypatch.setattr(QuantizedCache, "for_model", lambda model, bits: DynamicCache(config=model.config))
    model, text, how = tiny_llama(), prose(400), find_convention("gptq", 250)
    whole = evaluate(model, tokenizer_bos, text, how)
    pieces = evaluate(model, tokenizer_bos, text, how, kv_bits=8)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.tokens == whole.tokens


def test_kv_bits_of_a_cache_are_checked(tiny_llama, tokenizer_bos, prose):
    with pytest.raises(LlmqError, match="8 or 4, not 3"):
        evaluate(tiny_llama(), tokenizer_bos, prose(99), find_convention("gptq", 64), kv_bits=3)
