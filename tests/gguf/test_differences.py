"""What transformers computes otherwise than a program of llama.cpp is named, by what its modules do."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from llmq.errors import LlmqError
from llmq.gguf.architecture import architecture
from llmq.gguf.differences import gain

LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
LAYERS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmaConfig(), "'gemma' is not among"),
        (LlamaConfig(hidden_act="gelu"), "the activation 'gelu', which llama.cpp's llama does not compute"),
        (LlamaConfig(is_causal=False), "attention both ways"),
        (LlamaConfig(max_position_embeddings=2**40), "1,099,511,627,776 positions"),
        (LlamaConfig(rms_norm_eps=-1e-6), "norms add -1e-06"),
        (Qwen2Config(head_dim=64), "32 heads of 64 channels for a residual stream of 4096"),
        (LlamaConfig(head_dim=3), "32 heads of 3 channels"),
        (Qwen3Config(rope_parameters=LLAMA31, max_position_embeddings=131072), "no keys that rotate as"),
        (Gemma3TextConfig(query_pre_attn_scalar=100), "attention is scaled by 0.1, which llama.cpp's gemma3 does not"),
        (Gemma3TextConfig(hidden_activation="silu"), "the activation 'silu'"),
        (Gemma3TextConfig(attn_logit_softcapping=5.0), "attn_logit_softcapping: 5.0"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "attention both ways"),
        (Gemma3TextConfig(num_hidden_layers=4, layer_types=LAYERS), "windows of 4096, 0, 0, 4096 tokens in its blocks"),
        (Gemma3TextConfig(rope_parameters={"full_attention": YARN}), "scales others linearly at most"),
        (Gemma3Config(text_config={"final_logit_softcapping": 5.0}), "5.0, passed over within a gemma3, which llama"),
        (Gemma4TextConfig(use_bidirectional_attention="all"), "attention both ways"),
        (Gemma4TextConfig(num_kv_shared_layers=2), "block 23 makes the keys and values of the last 2"),
        (Gemma4TextConfig(vocab_size_per_layer_input=9), "9 tokens with an embedding for single blocks"),
        (Qwen3MoeConfig(norm_topk_prob=False), r"do not add up to 1 \(norm_topk_prob false\)"),
        (Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[3]), "block 3 without experts"),
        (
            Qwen2MoeConfig(norm_topk_prob=True),
            r"weights add up to 1 \(norm_topk_prob true\), which .*qwen2moe",
        ),
        (Qwen2MoeConfig(decoder_sparse_step=2), "block 0 without experts"),
        (OlmoeConfig(num_key_value_heads=4), "4 key-value heads for 16 query heads"),
        (OlmoeConfig(clip_qkv=8.0), "clip_qkv: 8.0"),
        (Glm4MoeConfig(n_group=8, topk_group=4), r"experts in 8 groups \(n_group\)"),
        (DeepseekV2Config(n_group=8, topk_group=4, topk_method="group_limited_greedy"), r"experts in 8 groups"),
        (DeepseekV2Config(num_hidden_layers=27), "27 blocks with a latent of q"),
        (DeepseekV2Config(num_hidden_layers=32, q_lora_rank=None), "32 blocks without a latent of q"),
        (DeepseekV3Config(rope_interleave=False), "rotary embedding of halves"),
        (DeepseekV3Config(num_key_value_heads=64), "64 key-value heads for 128 query heads"),
        (DeepseekV3Config(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}), "where they are equal"),
        (DeepseekV3Config(rope_parameters=YARN | {"rope_type": "linear"}), "no other scaling"),
        (GptOssConfig(swiglu_limit=3.0), "a gate of 1.702, clamped at 3.0"),
        (GptOssConfig(attention_bias=False), "attention without biases"),
        (Gemma2Config(final_logit_softcapping=None), "final_logit_softcapping: None"),
        (GraniteConfig(residual_multiplier=0.0), "residual_multiplier: 0.0"),
        (Olmo2Config(tie_word_embeddings=True), "a head that is the embedding"),
        (Phi3Config(num_attention_heads=24, head_dim=64), "24 heads of 64 channels"),
        (SmolLM3Config(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1]), "block 1 without rotary embedding"),
    ],
)
def test_what_computes_another_function_is_refused(config, message):
    with pytest.raises(LlmqError, match=message):
        architecture(config)


def test_a_head_of_its_own_is_refused_where_llama_cpp_reads_none():
    with pytest.raises(LlmqError, match=r"'gemma2' has no tensor lm_head\.weight"):
        architecture(Gemma2Config(tie_word_embeddings=False)).tensor("lm_head.weight")


class _Centred(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)


def test_a_norm_is_known_by_what_it_does():
    assert gain(LlamaRMSNorm(4, 1e-5), 1e-5) == 0 and gain(Gemma3RMSNorm(4, 1e-6), 1e-6) == 1
    assert gain(Qwen3_5RMSNormGated(4, 1e-6), 1e-6) == 0
    assert gain(LlamaRMSNorm(4, 1e-5), 1e-6) is None and gain(_Centred(4), 1e-6) is None


def test_ends_of_a_ramp_that_llama_cpp_rounds_are_taken_for_gpt_oss_alone_and_said():
    (said,) = architecture(GptOssConfig()).warnings()
    assert "off by up to" in said and "as in every GGUF file of gpt-oss" in said


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "phi3", "olmo2", "granite", "glm4", "smollm3", "gpt_oss"])
def test_the_defaults_of_a_family_are_its_program(kind):
    assert architecture(AutoConfig.for_model(kind)).blocks > 20
