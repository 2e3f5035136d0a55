"""Shared fixtures: two tiny byte-level tokenizers, tiny random Llamas, and checkpoints of both, built in code.

Everything is seeded, so that a checkpoint made twice with the same arguments has identical bytes. No test sees a GPU,
so that a test is the same everywhere; scripts/check_gpu.py and bench_kernels.py check what runs on one.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _llama_cpp import LlamaCpp
from _tiny import VOCAB, make_prose, make_tokenizer
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks torch for a device
settings.register_profile("llmq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmq")  # the same examples in every run, however busy the machine


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what was imported, which lives to the end: a fifth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let it go again."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_settled():
    """Forget after a test which calls of kernels it settled: it may have had others in their places."""
    yield
    if tune := sys.modules.get("llmq_kernels.tune"):
        tune.forget()


@pytest.fixture(autouse=True)
def _seeded():
    """Draw the same numbers in every run of a test: a bound that holds once holds always."""
    torch.manual_seed(0)


@pytest.fixture
def prose() -> Callable[..., str]:
    """`prose(words, seed=0)`: seeded text that the tiny tokenizers compress about twofold."""
    return make_prose


@pytest.fixture(scope="session")
def tokenizer_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts `<s>` (id 0) before every text."""
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def tokenizer_plain() -> PreTrainedTokenizerFast:
    """The same tokenizer, but it adds nothing to a text."""
    return make_tokenizer(bos=False)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., LlamaConfig]:
    """`tiny_config(**changes)`: a Llama of 2 layers, hidden 64, intermediate 128, 4 heads, 2 key-value heads."""

    def config(**changes: object) -> LlamaConfig:
        values = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        return LlamaConfig(**(values | changes))

    return config


@pytest.fixture(scope="session")
def tiny_llama(tiny_config: Callable[..., LlamaConfig]) -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(seed=0, dtype=torch.float32, **config changes)`: a random Llama in eval mode."""

    def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(tiny_config(**changes)).to(dtype).eval()

    return model


@pytest.fixture
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tokenizer_bos: PreTrainedTokenizerFast,
    tokenizer_plain: PreTrainedTokenizerFast,
) -> Callable[..., Path]:
    """`tiny_checkpoint(seed=0, dtype=torch.float32, bos=True, shard="5GB", **config changes)`: a new folder each call.

    It holds a random Llama (safetensors, in several shards if `shard` is small, e.g. "100KB") and its tokenizer.
    """

    def checkpoint(
        seed: int = 0, dtype: torch.dtype = torch.float32, bos: bool = True, shard: str = "5GB", **changes: object
    ) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        tiny_llama(seed, dtype, **changes).save_pretrained(folder, max_shard_size=shard)
        (tokenizer_bos if bos else tokenizer_plain).save_pretrained(folder)
        return folder

    return checkpoint


@pytest.fixture
def llama_cpp():
    """`llama_cpp(path)`: run a GGUF file."""
    pytest.importorskip("xllamacpp", reason="needs the xllamacpp wheel (pip install -e '.[test]')")
    return LlamaCpp
