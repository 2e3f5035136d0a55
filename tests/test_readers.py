"""Which runtimes take a file: a table by format and scheme, docs/runtimes.md, --for and verify --runtime."""

import json
import shutil
from pathlib import Path

import pytest
import runtimes
import typer
from _docs import written
from _forked import llmq

from llmq.api import convert
from llmq.cli import app
from llmq.formats.awq import AWQ
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.gguf import Gguf
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.grids.q4_k import Q4_K
from llmq.grids.q5_1 import Q5_1
from llmq.readable import readers_of
from llmq.readers import ALIASES, RUNTIMES, Limit, readers, require, runtime, table, told
from llmq.types import LinearSpec, LlmqError, Scheme

GOLDEN = Path(__file__).with_name("golden")
BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj")
TOKEN, STATIC = Int(8, True, "channel"), Int(8, True, "tensor")


def linears(grid, activation=None, names=BLOCK, more=()):
    names = [*(f"model.layers.0.{n}" for n in names), *more]
    return [LinearSpec(n, 64, 256, Scheme(grid, activation)) for n in names]


def accepted(form, specs, skipped=()):
    """Return what each runtime says: yes, no, or ? where nobody knows."""
    rows = form.readers(specs, skipped)
    assert [(r.runtime, r.version) for r in rows] == [(name, r.version) for name, r in RUNTIMES.items()]
    assert all(r.reason for r in rows if not r.accepts) and all(r.known for r in rows if r.accepts is not None)
    return "".join({True: "y", False: "n", None: "?"}[r.accepts] for r in rows[:5])


def test_a_runtime_goes_by_its_names_and_a_refusal_by_the_users_paths():
    names = ("tensorrt_llm", "TRT-LLM", "llamacpp", "llama-cpp", "hf", "mlx_lm", "onnxruntime_genai", "XNNPACK")
    wanted = ["TensorRT-LLM"] * 2 + ["llama.cpp"] * 2 + ["transformers", "MLX", "onnxruntime-genai", "ExecuTorch"]
    assert [runtime(name) for name in names] == wanted and set(ALIASES.values()) <= RUNTIMES.keys()
    rows = {r.runtime: r for r in GPTQ().readers(linears(Int(4, True, 128)))}
    assert "`llmq export ./q ./q-mlx --to mlx` keeps" in rows["MLX"].refusal("./q")
    assert "`llmq export ./q ./q.gguf` or `--to onnx:qdq`" in rows["OpenVINO"].at("./q").reason
    assert "OUT NEW" in rows["MLX"].reason
    with pytest.raises(LlmqError, match=r"`llmq export a/b a/b-onnx --to onnx` makes a folder"):
        require(rows.values(), "genai", "a/b")


def test_an_exported_folder_is_known_by_its_record_and_verified_by_its_checksums(tmp_path):
    shutil.copytree(GOLDEN / "gptq_v1_w4g32_sym", tmp_path / "m")
    for file in (GOLDEN / "float").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "onnx", "onnx:qdq")
    rows = {r.runtime: r.accepts for r in readers_of(str(tmp_path / "onnx"))}
    assert [n for n in rows if rows[n]] == ["onnxruntime-genai", "OpenVINO"] and rows["TensorRT"] is None
    assert rows["vLLM"] is False and rows.keys() == RUNTIMES.keys()
    assert llmq("verify", tmp_path / "onnx", "--runtime", "ort").returncode == 0
    done = llmq("verify", tmp_path / "onnx", "--runtime", "vllm")
    assert done.returncode and "it reads no ONNX; export for it what this was made of" in done.stderr
    (tmp_path / "onnx" / "genai_config.json").write_text("{}")
    done = llmq("verify", tmp_path / "onnx")
    assert done.returncode and "genai_config.json is not as written" in done.stderr


@pytest.mark.parametrize(
    ("form", "specs", "said"),  # transformers, vLLM, SGLang, llama.cpp, TensorRT-LLM
    [
        (GPTQ(), linears(Int(4, True, 128)), "yyynn"),
        (GPTQ(), linears(Int(8, True, 128)), "yyynn"),
        (GPTQ(), linears(Int(4, False, 128)), "ynynn"),
        (GPTQ(), linears(Int(3, True, 128)), "ynynn"),
        (GPTQ(), linears(Int(4, True, 16)), "ynynn"),
        (GPTQ(desc_act=True), linears(Int(4, True, 128)), "ynynn"),
        (GPTQ(), linears(Int(4, True, 128), more=("lm_head",)), "nyynn"),
        (GPTQ(), linears(Int(4, True, 128), names=EXPERTS), "yyynn"),
        (GPTQ(), linears(Int(4, False, 128), names=EXPERTS), "ynnnn"),
        (AWQ(), linears(Int(4, False, 128)), "yyynn"),
        (AWQ(), linears(Int(4, True, 96)), "nnynn"),
        (CompressedTensors(), linears(Int(4, True, 128)), "yyynn"),
        (CompressedTensors(), linears(Int(4, False, 128)), "yyynn"),
        (CompressedTensors(), linears(Int(4, False, 128)) + linears(Int(8, True, 128), names=EXPERTS), "nyynn"),
        (CompressedTensors(), linears(Int(3, True, 128)), "yynnn"),
        (CompressedTensors(), linears(Int(4, True, "tensor")), "ynnnn"),
        (CompressedTensors(), linears(Int(8, True, "channel"), TOKEN), "yyynn"),
        (CompressedTensors(), linears(Int(8, False, "channel"), TOKEN), "ynynn"),
        (CompressedTensors(), linears(Int(8, True, "channel"), STATIC), "yyynn"),
        (CompressedTensors(), linears(Int(8, True, "channel"), STATIC, names=EXPERTS), "ynynn"),
        (CompressedTensors(), linears(Int(4, False, 128), names=EXPERTS), "nynnn"),
        (CompressedTensors(kv="tensor", kv_dtype="int8"), linears(Int(4, True, 128)), "ynynn"),
        (CompressedTensors(kv="tensor"), linears(Int(4, True, 128)), "yyynn"),
        (CompressedTensors(), linears(Int(4, True, 128), more=("lm_head",)), "yyynn"),
        (Gguf(), linears(Q4_K()), "?n?yn"),
    ],
)
def test_who_reads_what(form, specs, said):
    assert accepted(form, specs) == said


def test_a_part_that_is_left_float_is_refused_by_who_fuses():
    specs = linears(Int(4, True, 128), names=[n for n in BLOCK if "k_proj" not in n])
    assert accepted(GPTQ(), specs, ["model.layers.0.self_attn.k_proj"]) == "ynnnn"


@pytest.mark.parametrize("form", [GPTQ(), AWQ(), CompressedTensors()])
def test_warnings_are_limits_of_a_runtime(form):
    """What a user is warned of stands in the row of a runtime, word for word."""
    specs = linears(Int(4, False, 16), more=("lm_head",))
    reasons = " ".join(r.reason for r in form.readers(specs))
    warned = form.check(specs)
    assert warned and all(line in reasons for line in warned)


def test_how_it_is_known_is_said_row_by_row():
    rows = {r.runtime: r for r in CompressedTensors().readers(linears(Int(8, True, 128)))}
    assert rows["transformers"].known == "ran" and rows["vLLM"].known == rows["SGLang"].known == "source"
    assert "on GPUs, not on CPUs" in rows["vLLM"].reason and rows["vLLM"].accepts
    known = {r.runtime: r.known for r in Gguf().readers(linears(Q5_1()))}
    assert known["llama.cpp"] == "source" and known["transformers"] == ""


def test_what_refuses_hides_what_is_only_noted_and_silent_limits_are_no_warnings():
    known = table(("vLLM", True, "with care", "ran"), ("SGLang", False, "never", "source"))
    limits = [Limit("slowly", notes=("vLLM",)), Limit("not at all", refuses=("vLLM", "SGLang"), told=False)]
    _, vllm, sglang, *_ = readers(known, limits)
    assert (vllm.accepts, vllm.reason, sglang.reason) == (False, "not at all", "never") and told(limits) == ["slowly"]
    _, vllm, *_ = readers(known, limits[:1])
    assert vllm.accepts and vllm.reason == "with care; slowly"


def test_a_runtime_that_would_not_load_it_is_refused_with_what_it_takes():
    rows = GPTQ().readers(linears(Int(3, True, 128)))
    require(rows, "transformers")
    with pytest.raises(LlmqError, match=r"^vLLM 0\.32 does not take this: 3-bit gptq .*not by vLLM\. It takes 4 bits"):
        require(rows, "vLLM")
    with pytest.raises(LlmqError, match=r"transformers 5\.24 is not known to take this: .* floats"):
        require(Gguf().readers(linears(Q4_K())), "transformers")
    with pytest.raises(LlmqError, match="nothing is known of this format there"):
        require([], "SGLang")
    assert runtime(" VLLM") == "vLLM" and runtime("tensorrt-llm") == "TensorRT-LLM"
    options = typer.main.get_command(app).commands["quantize"].params
    (said,) = (o.help for o in options if o.name == "runtime")
    assert all(name.lower() in said for name in RUNTIMES)
    with pytest.raises(LlmqError, match="--for 'ollama': no such .*transformers, vllm, sglang, llama.cpp, tensor"):
        runtime("ollama")


def test_the_table_in_the_docs_is_what_the_rules_say():
    doc = Path(__file__).parents[1] / "docs" / "runtimes.md"
    assert doc.read_text() == written(doc, "runtimes.py", runtimes.tables()), "run scripts/runtimes.py --doc"


def test_weights_that_do_not_fill_the_tiles_of_a_kernel_are_named():
    odd = [LinearSpec("model.layers.0.mlp.up_proj", 1536, 576, Scheme(Int(4, True, 64)))]
    rows = {r.runtime: r for r in GPTQ().readers(odd)}
    assert "not 1536 x 576 (model.layers.0.mlp.up_proj)" in rows["vLLM"].reason
    assert rows["vLLM"].accepts and rows["vLLM"].known == "source"


@pytest.mark.parametrize(
    ("name", "said"),  # transformers, vLLM, SGLang, llama.cpp, TensorRT-LLM, MLX, onnxruntime-genai, OpenVINO, ...
    [("gptq_v1_w4g32_sym", "yyynnnnnnn"), ("gptq_v1_w4g32_desc_act", "ynynnnnnnn"), ("awq_w4g32", "yyynnynnnn"),
     ("ct_pack_w3g32", "yynnnnnnnn"), ("ct_fp8_static", "yyynynnnnn")],
)  # fmt: skip
def test_a_checkpoint_that_is_there_is_judged_by_its_headers(name, said):
    rows = readers_of(str(GOLDEN / name))
    assert "".join("y" if r.accepts else "n" for r in rows) == said


def test_scales_of_an_int8_cache_are_seen(tmp_path):
    folder = shutil.copytree(GOLDEN / "ct_pack_w4g32_sym", tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "int", "strategy": "tensor"}
    (folder / "config.json").write_text(json.dumps(config))
    vllm = readers_of(str(folder))[1]
    assert vllm.accepts is False and "static int8 scales of the key-value cache" in vllm.reason


def test_verify_says_whether_a_runtime_loads_it_and_how_it_is_run():
    done = llmq("verify", GOLDEN / "awq_w4g32", "--runtime", "mlx")
    assert done.returncode == 0 and f"takes it: mlx_lm.generate --model {GOLDEN / 'awq_w4g32'}" in done.stdout
    done = llmq("verify", GOLDEN / "gptq_v1_w4g32_desc_act", "--runtime", "vLLM")
    assert done.returncode == 1 and "vLLM 0.32 does not take this: vLLM 0.32 refuses desc_act" in done.stderr
    done = llmq("verify", GOLDEN / "float", "--runtime", "vllm")
    assert done.returncode == 1 and "is a float checkpoint" in done.stderr and done.stderr.count("\n") == 1
    done = llmq("verify", GOLDEN / "awq_w4g32", "--runtime", "")  # as an unset variable of a script
    assert done.returncode == 1 and "--runtime '': no such runtime is known" in done.stderr
