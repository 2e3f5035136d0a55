"""Every architecture: a tiny random model written in full, whose logits llama.cpp and transformers agree on."""

from dataclasses import replace

import gguf
import pytest
import torch
from _rewriting import rewrite_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llmq.checkpoint import Source
from llmq.export._run import export
from llmq.gguf import imatrix
from llmq.gguf.programs import PROGRAMS
from llmq.gguf.reader import GgufFile
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError
from llmq.verify import verify
from llmq.verify.ggml import open_gguf
from llmq.verify.report import Report

SIZES = {"vocab_size": 328, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
         "initializer_range": 0.2}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = HALF | {"rope_type": "longrope", "short_factor": [1.0, 1.5, 1.2, 2.0], "long_factor": [2.0, 4.0, 9.0, 30.0],
               "original_max_position_embeddings": 256}  # fmt: skip
YARN = PLAIN | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
FOUR = {"attention_multiplier": 0.4, "embedding_multiplier": 1.7, "residual_multiplier": 0.6, "logits_scaling": 1.5}
LINEAR_ATTENTION = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
                    "linear_value_head_dim": 32, "rope_parameters": HALF | {"mrope_section": [3, 3, 2]}}  # fmt: skip
ROUTED = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16,
          "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
          "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "rope_parameters": PLAIN,
          "norm_topk_prob": False, "routed_scaling_factor": 1.7, "max_position_embeddings": 512}  # fmt: skip
BLOCKS = {"head_dim": 32, "global_head_dim": 64, "sliding_window": 6, "num_hidden_layers": 5,
          "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention", "full_attention"],
          "rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 1e5,
                                                 "partial_rotary_factor": 0.25}, "sliding_attention": PLAIN},
          "final_logit_softcapping": 5.0, "vocab_size_per_layer_input": 328}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32}
WRAPPED = {  # a model that reads images, and of what its language model is
    "gemma3": {"vision_config": VISION | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                                          "patch_size": 14}, "mm_tokens_per_image": 4},
    "qwen3_5": {"vision_config": VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 64,
                                           "num_position_embeddings": 16}},
}  # fmt: skip
WRAPPED["gemma4"] = {"vision_config": VISION | {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
                                               "num_key_value_heads": 2, "position_embedding_size": 64}}  # fmt: skip
WRAPPED["qwen3_5_moe"] = WRAPPED["qwen3_5"]
WITHIN = {"gemma4": {"pad_token_id": 0}}  # which caps logits there too, and wants a token for images to stand for
CASES = {  # options that only a file that says them computes rightly
    "gemma2": {"head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 32, "final_logit_softcapping": 4.0},
    "gemma3_text": {"head_dim": 32, "sliding_window": 6, "num_hidden_layers": 7, "query_pre_attn_scalar": 32,
                    "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN},
                    "final_logit_softcapping": 5.0},
    "gemma4_text": BLOCKS | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32},
    "gemma4_text experts": BLOCKS | {"attention_k_eq_v": True, "num_global_key_value_heads": 1,
                                     "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
                                     "top_k_experts": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False},
    "phi3": {"rope_parameters": HALF},
    "phi3 of two lengths": {"rope_parameters": LONG, "max_position_embeddings": 1024,
                            "original_max_position_embeddings": 256},
    "olmo2": {"rope_parameters": PLAIN},
    "granite": FOUR | {"attention_bias": True, "mlp_bias": True},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_moe": ROUTED | {"norm_topk_prob": True, "head_dim": 32},
    "qwen2_moe": ROUTED | {"norm_topk_prob": False, "shared_expert_intermediate_size": 64},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 12, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "granitemoe": FOUR | {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    "glm4_moe": {"head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "n_group": 1,
                 "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
                 "routed_scaling_factor": 1.7, "rope_parameters": HALF},
    "deepseek_v2": LATENT | {"q_lora_rank": None, "num_hidden_layers": 27},
    "deepseek_v2 scaled": LATENT | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    "deepseek_v3 scaled": LATENT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_moe_text": ROUTED | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 6,
                "rope_parameters": YARN, "max_position_embeddings": 512},
    "smollm3": {"num_hidden_layers": 5, "rope_parameters": PLAIN, "initializer_range": 0.3,
                "tie_word_embeddings": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer_plain):
    """`written(kind, **options)`: a random model, its folder and its file, in float32."""

    def write(kind, **options):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind.split()[0], **(SIZES | CASES[kind] | options))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, p in model.named_parameters():
            if p.dim() == 1:
                torch.nn.init.normal_(p, 0.5 if "norm" in name else 0, 0.3)
        for name, b in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar")):
                torch.nn.init.normal_(b, 1 if name.endswith("layer_scalar") else 0, 0.3)
        folder = tmp_path_factory.mktemp(kind.split()[0])
        model.save_pretrained(folder / "model")
        tokenizer_plain.save_pretrained(folder / "model")
        recipe = Recipe(format="gguf", method="rtn", type="F32", dtype="float32")
        quantize(prepare(str(folder / "model"), recipe, "cpu"), folder / "out.gguf")
        return model, folder / "model", folder / "out.gguf"

    return write


def wrapped(kind):
    """Return a model that reads images around a language model of CASES, in float32."""
    torch.manual_seed(0)
    text = SIZES | CASES[f"{kind}_text"] | WITHIN.get(kind, {"final_logit_softcapping": None})
    config = AutoConfig.for_model(kind, text_config=text, **WRAPPED[kind])
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def difference(model, running, length=24):
    """Return the largest difference of a log-probability behind so many tokens, more than any window."""
    ids = torch.randint(2, 320, (length,)).tolist()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return max(abs(wanted[i].item() - p) for i, p in running.log_probabilities(ids, 328).items())


@pytest.mark.parametrize("kind", CASES)
def test_llama_cpp_computes_what_transformers_does(kind, written, llama_cpp):
    model, folder, out = written(kind)
    assert difference(model, llama_cpp(out)) < 0.03
    report = verify(out, folder)  # read back by other code, and beside the model: what the keys say is its config
    assert report.passed, report.failures
    assert report.figures["kl"] < 1e-6


WIDER = {"intermediate_size": 128, "moe_intermediate_size": 64}  # rows that NVFP4's blocks divide


@pytest.mark.parametrize("kind", [k for k in CASES if " " not in k and k != "deepseek_v2"])  # v3's graph, 27 blocks
def test_llama_cpp_multiplies_by_the_factors_of_nvfp4_that_it_reads(kind, written, tmp_path, llama_cpp):
    """Within what rounding inputs to 8 bits costs: without a factor products are 1e4 times as large."""
    more = {k: v for k, v in WIDER.items() if k in SIZES | CASES[kind]}
    _, folder, _ = written(kind, **more)
    recipe = Recipe(format="gguf", method="rtn", type="NVFP4", dtype="float32")
    plan = prepare(str(folder), recipe, "cpu")
    quantize(plan, tmp_path / "out.gguf")
    found, _ = open_gguf(tmp_path / "out.gguf", report := Report())
    tensors = GgufFile(tmp_path / "out.gguf").tensors
    factors = [n for n in tensors if n.endswith(".scale")]
    assert len(factors) >= 4 and all(
        tensors[f"{n.removesuffix('scale')}weight"].tensor_type.name == "NVFP4" for n in factors
    )
    others = {n for n, t in tensors.items() if t.tensor_type.name == "IQ4_NL" and "ssm_out" not in n}  # of 32 columns
    assert bool(others) == any("passes over the factor (.scale)" in w for w in plan.warnings)
    decoded = found.skeleton.filled(torch.device("cpu"))
    assert difference(decoded, llama_cpp(tmp_path / "out.gguf")) < 2 and report.passed, report.failures
    for name in sorted(others)[:1]:
        with pytest.raises(LlmqError, match=f"{name} cannot be NVFP4: llama.cpp passes over the factor"):
            prepare(str(folder), replace(recipe, override=(f"^{name}:type=NVFP4",)), "cpu")


@pytest.mark.parametrize("kind", WRAPPED)
def test_of_a_model_that_reads_images_the_language_model_is_written(kind, tmp_path, tokenizer_plain, llama_cpp):
    model = wrapped(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer_plain.save_pretrained(tmp_path / "model")
    plan = prepare(str(tmp_path / "model"), Recipe(format="gguf", method="rtn", type="F16", dtype="float32"), "cpu")
    assert any(f"convert_hf_to_gguf.py {tmp_path / 'model'} --mmproj makes" in w for w in plan.warnings)
    quantize(plan, tmp_path / "out.gguf")
    report = verify(tmp_path / "out.gguf", tmp_path / "model")
    assert report.passed and report.checked["floats compared with the source"] > 40, report.failures
    assert difference(model, llama_cpp(tmp_path / "out.gguf")) < 0.1


def test_value_heads_move_in_blocks_of_whole_columns(tmp_path, written):
    """Blocks of 256 columns hold several heads, so the output of linear attention takes types of 32 columns."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "linear_num_value_heads": 8}
    _, folder, _ = written("qwen3_5_text", **wide)
    plan = prepare(str(folder), Recipe(format="gguf", method="rtn", type="Q4_K_M", dtype="float32"), "cpu")
    assert any("rows of 32, 128 columns" in w and "are Q5_0 in place of Q4_K" in w for w in plan.warnings)
    quantize(plan, tmp_path / "out.gguf")
    kinds = {n: t.tensor_type.name for n, t in GgufFile(tmp_path / "out.gguf").tensors.items()}
    assert kinds["blk.0.ssm_out.weight"] == "Q5_0" and kinds["blk.0.attn_gate.weight"] == "Q4_K"
    assert kinds["blk.0.ssm_conv1d.weight"] == kinds["blk.0.ssm_a"] == "F32"
    assert verify(tmp_path / "out.gguf", folder).passed


def test_a_packed_folder_is_exported_by_the_same_program(tmp_path, tokenizer_plain, llama_cpp):
    """A wrapper with linear attention and experts, in 16-bit floats: what llama.cpp wants in float32 is."""
    model = wrapped("qwen3_5_moe").half()
    model.save_pretrained(tmp_path / "model")
    tokenizer_plain.save_pretrained(tmp_path / "model")
    recipe = Recipe(format="compressed-tensors", method="rtn", bits=8, group_size=32, skip=("in_proj_[ab]",))
    quantize(prepare(str(tmp_path / "model"), recipe, "cpu"), tmp_path / "packed")
    done = export(str(tmp_path / "packed"), tmp_path / "out.gguf")
    assert done["outcomes"]["values exact"] > 4 * 3 * 12
    tensors = GgufFile(tmp_path / "out.gguf").tensors
    for leaf in ("ssm_conv1d.weight", "ffn_gate_inp.weight", "ssm_a", "attn_norm.weight"):
        assert tensors[f"blk.0.{leaf}"].tensor_type.name == "F32", leaf
    report = verify(tmp_path / "out.gguf", tmp_path / "packed")
    assert report.passed, report.failures
    assert difference(model.float(), llama_cpp(tmp_path / "out.gguf")) < 1.5  # of 8 bits


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text"])
def test_experts_lie_in_one_tensor_and_have_a_row_of_importance_each(kind, written, tmp_path, prose):
    _, folder, _ = written(kind)
    (tmp_path / "text.txt").write_text(prose(400))
    file, out = tmp_path / "imatrix.gguf", tmp_path / "out.gguf"
    how = {"format": "gguf", "type": "Q4_0", "dtype": "float32"}
    calibrated = Recipe(**how, method="rtn:importance=true", calib=str(tmp_path / "text.txt"), samples=2, seq_len=32,
                        imatrix_out=str(file))  # fmt: skip
    quantize(prepare(str(folder), calibrated, "cpu"), out)
    report = verify(out, folder)
    assert report.passed and report.checked["errors measured again"] > 4 * 3 * 12, report.failures
    assert GgufFile(out).tensors["blk.0.ffn_up_exps.weight"].shape == (64, 32, 12)
    means = imatrix.read(file)
    assert means["blk.0.ffn_up_exps.weight"].shape == (12, 64)
    again = prepare(str(folder), Recipe(**how, method="rtn", imatrix=str(file)), "cpu").assigned.importance
    experts = "model.layers.0.mlp.experts.11.up_proj"
    reached = ~means["blk.0.ffn_up_exps.weight"].isnan().any(-1)
    assert reached.sum() > 6 and (experts in again) == bool(reached[11])
    if kind == "qwen3_5_moe_text":  # channels in ggml's order of heads, and back
        wide = means["blk.0.ssm_out.weight"].view(2, 2, 32).transpose(0, 1).reshape(-1)
        torch.testing.assert_close(again["model.layers.0.linear_attn.out_proj"], wide)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"sliding_window": 20}),
        ("gemma3_text", {"final_logit_softcapping": 9.0}),
        ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN | LINEAR}}),
        ("gemma4_text", {"sliding_window": 20}),
        ("gemma4_text", {"final_logit_softcapping": 9.0}),
        ("gemma4_text", {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}),
        ("gemma4_text experts", {"top_k_experts": 1}),
        ("phi3", {"rope_parameters": HALF | {"partial_rotary_factor": 1.0}}),
        ("granite", {"residual_multiplier": 0.9}),
        ("qwen3_moe", {"num_experts_per_tok": 1}),
        ("gpt_oss", {"sliding_window": 20}),
        ("glm4", {"rope_parameters": HALF | {"partial_rotary_factor": 1.0}}),
        ("deepseek_v2 scaled", {"rope_parameters": YARN | {"mscale": 3.0, "mscale_all_dim": 3.0}}),
        ("deepseek_v3", {"topk_group": 4}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3 scaled", {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 0.5}}),
        ("smollm3", {"no_rope_layers": [1] * 5}),
    ],
)
def test_the_comparison_sees_each_of_them(kind, change, written, llama_cpp):
    model, _, out = written(kind)
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind.split()[0], **(SIZES | CASES[kind] | change)), attn_implementation="eager"
    )
    other.load_state_dict(model.state_dict())
    assert difference(other.eval(), llama_cpp(out)) > 0.2


def test_keys_with_which_transformers_does_not_run_are_a_failure(written, tmp_path):
    _, _, out = written("deepseek_v3")
    odd = rewrite_gguf([out], tmp_path / "odd.gguf", {"deepseek2.expert_group_count": 3})  # of 8 experts
    (said,) = verify(odd).failures
    assert f"{odd}: transformers does not run the model that its config or keys say: " in said


def test_the_frequencies_of_phi_are_those_of_the_context_that_llama_cpp_is_started_with(written, llama_cpp):
    model, folder, out = written("phi3 of two lengths")
    short, long = llama_cpp(out), llama_cpp(out, context=512)  # which is rounded up to 256
    assert difference(model, short) < 0.03 and difference(model, long, 300) < 0.03
    assert difference(model, long) > 0.1  # a short text with a long context, which a warning names
    recipe = Recipe(format="gguf", method="rtn", type="F32", dtype="float32")
    assert "more than 256 tokens (-c)" in prepare(str(folder), recipe, "cpu").warnings[0]


def test_gemma_3_has_the_keys_of_googles_own_file(written):
    """Names of keys and tensors, as in the GGUF of Gemma 3 270M; beside them the period and the window's own base."""
    _, folder, out = written("gemma3_text")
    file = GgufFile(out)
    theirs = {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
              "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length", "rope.freq_base",
              "attention.sliding_window", "attention.head_count_kv"}  # fmt: skip
    ours = {k.removeprefix("gemma3.") for k in file.keys() if k.startswith("gemma3.")}  # noqa: SIM118
    assert theirs <= ours and {"attention.sliding_window_pattern", "rope.freq_base_swa"} <= ours
    leaves = {"attn_k", "attn_k_norm", "attn_norm", "attn_output", "attn_q", "attn_q_norm", "attn_v", "ffn_down",
              "ffn_gate", "ffn_norm", "ffn_up", "post_attention_norm", "post_ffw_norm"}  # fmt: skip
    assert {n.split(".")[2] for n in file.tensors if n.startswith("blk.0.")} == leaves
    norm = Source(folder).get("model.layers.0.input_layernorm.weight")
    assert torch.equal(torch.from_numpy(file.tensors["blk.0.attn_norm.weight"].data.copy()), 1 + norm)


def test_every_program_is_an_architecture_that_gguf_names():
    assert len(PROGRAMS) > 10
    for program in PROGRAMS.values():
        assert program.name == gguf.MODEL_ARCH_NAMES[program.arch] and program.arch in gguf.MODEL_TENSORS
