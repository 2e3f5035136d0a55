"""A checkpoint scored block by block has the figures of one that is scored whole."""

import subprocess
import sys

import pytest
import torch
from _families import FAMILIES
from safetensors.torch import load_file, save_file

import llmq
from llmq.evaluation import streamed
from llmq.evaluation.streamed import Streamed
from llmq.runtime.linear import QuantLinear
from llmq.types import LlmqError

WEIGHTS = {"method": "rtn", "group_size": 32, "device": "cpu", "verify": False, "warn": str}
W8A8 = {"bits": 8, "act_bits": 8, "group_size": "channel", "format": "compressed-tensors"}


@pytest.fixture
def text(tmp_path, prose):
    (tmp_path / "t.txt").write_text(prose(400))
    return tmp_path / "t.txt"


def figures(*args, **options):
    return llmq.evaluate(*args, device="cpu", **options).to_json() | {"seconds": 0}


@pytest.mark.parametrize(
    ("packed", "dtype"),
    [
        ({"format": "gptq", "lm_head": True}, "float32"),
        ({"format": "gptq", "lm_head": True}, "bfloat16"),
        ({"format": "awq", "sym": False, "skip": ("layers.0.self_attn.v_proj",)}, "bfloat16"),
        ({"format": "compressed-tensors", "bits": 3}, "bfloat16"),
        ({**W8A8, "act": "token", "lm_head": True}, "bfloat16"),
        ({**W8A8, "act": "tensor", "samples": 4, "seq_len": 32}, "float32"),
    ],
    ids=lambda p: f"{p['format']}-{p.get('act', p.get('bits', 4))}" if isinstance(p, dict) else p,
)
def test_packed_linears_give_the_figures_of_the_whole_model(packed, dtype, tiny_checkpoint, tmp_path, text):
    """Bit for bit: the same modules, the same back-ends, activations quantized where the runtime quantizes them."""
    src, out = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out"
    llmq.quantize(src, out, calib=text, **WEIGHTS | packed)
    options = {"baseline": src, "text": text, "window": 48, "dtype": dtype}
    whole = figures(out, **options)
    assert figures(out, stream=True, **options) == whole and whole["kl_mean"] > 1e-5 and whole["tokens"] > 200


@pytest.mark.parametrize("convention", ["llama.cpp", "lm-eval"])
def test_every_convention(convention, tiny_checkpoint, text):
    a, b = tiny_checkpoint(seed=0), tiny_checkpoint(seed=1, shard="100KB")
    options = {"baseline": a, "text": text, "window": 32, "convention": convention}
    whole = figures(b, **options)
    assert figures(b, stream=True, **options) == whole and whole["tokens"] > 3 * 31
    assert figures(b, stream=True, windows=1, **options)["tokens"] <= whole["tokens"]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3_next", "mistral3", "phi3", "gpt_neox"])
def test_families_as_they_are(name, tmp_path, text):
    """Capped logits, a wrapper's language model, a state beside attention, tied and fused weights."""
    FAMILIES[name].save(tmp_path / "src")
    options = {"text": text, "window": 40, "windows": 3}
    assert figures(tmp_path / "src", stream=True, **options) == figures(tmp_path / "src", **options)


def test_experts_float_and_packed(tmp_path, text):
    """Float ones are multiplied together by transformers, which in bfloat16 rounds otherwise."""
    src, out = tmp_path / "src", tmp_path / "out"
    FAMILIES["mixtral"].save(src)
    llmq.quantize(src, out, format="gptq", **WEIGHTS)
    options = {"text": text, "window": 40, "windows": 3}
    assert figures(out, stream=True, **options) == figures(out, **options)
    single = options | {"dtype": "float32"}
    assert figures(src, stream=True, **single)["perplexity"] == pytest.approx(
        figures(src, **single)["perplexity"], rel=1e-6
    )
    assert figures(src, stream=True, **options)["perplexity"] == pytest.approx(
        figures(src, **options)["perplexity"], rel=2e-3
    )


def test_what_transformers_keeps_in_float32_stays_so(tmp_path, text):
    FAMILIES["deepseek_v3"].save(tmp_path)
    skeleton = Streamed(tmp_path, "the model", device="cpu").skeleton
    with skeleton.loaded(1, torch.device("cpu")) as block:
        kinds = {n: t.dtype for n, t in block.state_dict().items()}
    assert kinds["mlp.gate.e_score_correction_bias"] == torch.float32
    assert kinds["self_attn.o_proj.weight"] == torch.bfloat16


def test_one_block_is_in_memory_at_a_time_and_nothing_is_left(tiny_checkpoint, tmp_path, text, monkeypatch):
    src, out, seen, room = tiny_checkpoint(), tmp_path / "out", [], tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(streamed.tempfile, "tempdir", str(room))
    llmq.quantize(src, out, **WEIGHTS, format="gptq", lm_head=True)
    model = Streamed(out, "the model", device="cpu", work=lambda *at: seen.append((*at, held(model))))

    def held(model):
        skeleton = model.skeleton.model
        packed = {n for n, m in skeleton.named_modules() if isinstance(m, QuantLinear) and m.prepacked is not None}
        real = {n for n, p in skeleton.named_parameters() if not p.is_meta}
        return packed | real, len(list(room.rglob("hidden-*")))

    windows = [list(range(2, 22)), list(range(5, 17))]
    with torch.inference_mode():
        states = model.each(windows)
        first = next(states)
        head, files = held(model)
        assert first.shape == (20, 64) and files == 2 and "lm_head" in head and not any("layers" in n for n in head)
        log_p = model.log_probs(first)
        assert log_p.shape == (20, 320) and next(states).shape == (12, 64) and next(states, None) is None
    assert [at[:3] for at in seen] == [(i, 2, f"the model, block {i}") for i in range(2)]
    assert all(at[3] == (set(), 2) for at in seen)
    assert held(model) == (set(), 0) and not list(room.iterdir())
    with torch.no_grad():
        want = llmq.load(out, device="cpu")(torch.tensor(windows[:1])).logits[0].float().log_softmax(-1)
    assert torch.equal(log_p, want)


def test_refusals_are_one_line(tiny_checkpoint, tmp_path, text, monkeypatch):
    src = tiny_checkpoint()
    with pytest.raises(LlmqError, match="leave out --stream"):
        figures(src, text=text, window=32, kv_bits=8, stream=True)
    usage = streamed.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(streamed.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(LlmqError, match=r"the states of .* tokens take .* TMPDIR"):
        figures(src, text=text, window=32, stream=True)
    file = src / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LlmqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        figures(src, text=text, window=32, stream=True)


def test_broken_logits_name_the_window(tiny_checkpoint, text):
    src = tiny_checkpoint()
    file = src / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LlmqError, match=r"window 1 of \d+: the baseline gives NaN"):
        figures(tiny_checkpoint(), baseline=src, text=text, window=32, stream=True)


_CHILD = """
import sys
import llmq
from llmq.progress import Memory
small, text, large = sys.argv[1:]
llmq.evaluate(small, text=text, window=16, windows=1, device="cpu")  # what code takes
for stream in (True, False):
    before = Memory.held().most
    llmq.evaluate(large, text=text, window=16, windows=2, stream=stream, device="cpu")
    print((Memory.held().most - before) / 2**20)
"""


def test_memory_is_that_of_a_block_however_many_there_are(tiny_checkpoint, text):
    """24 blocks of 8 MB: 192 MB whole."""
    sizes = {"hidden_size": 256, "intermediate_size": 2304, "num_hidden_layers": 24}
    folders = map(str, (tiny_checkpoint(), text, tiny_checkpoint(**sizes)))
    done = subprocess.run([sys.executable, "-c", _CHILD, *folders], capture_output=True, text=True, check=True)
    streamed, more_whole = map(float, done.stdout.split())
    assert streamed < 40 and more_whole > 120, done.stdout
