"""A GGUF file as a source of codes: kept in other formats to the last bit, and the same blocks on the way back."""

import json

import pytest
import torch
from _tiny import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.errors import LlmqError
from llmq.export._as_format import DECODED
from llmq.export._kept import FACTOR
from llmq.export._run import export
from llmq.export._target import EXACT, REQUANTIZED
from llmq.export._unpack import grid_of, unpacked
from llmq.gguf import kinds
from llmq.gguf.reader import GgufFile
from llmq.grids.int import Int
from llmq.types import Params

IDS = torch.arange(3, 35)[None]
SUPER = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_llama, tokenizer_plain):
    """`files(kind)`: a tiny Llama whose blocks are all of one type, by rounding to nearest."""
    room = tmp_path_factory.mktemp("gguf")

    def of(kind):
        out = room / f"{kind}.gguf"
        if not out.exists():
            sizes = SUPER if kinds.KINDS[kind].columns == 256 else {"num_hidden_layers": 1}
            tiny_llama(dtype=torch.bfloat16, **sizes).save_pretrained(room / kind)
            tokenizer_plain.save_pretrained(room / kind)
            override = f"blk:type={kind}"
            llmq.quantize(room / kind, out, type=kind, override=[override], method="rtn", warn=print)
        return out

    return of


def blocks(file):
    """Return the stored bytes of every matrix of a block."""
    return {n: t.data.tobytes() for n, t in GgufFile(file).tensors.items() if n.startswith("blk.") and len(t.shape) > 1}


def logits(folder, **options):
    with torch.no_grad():
        return llmq.load(folder, dtype=torch.float32, **options)(IDS).logits


THERE = [
    ("Q4_0", "gptq"), ("Q5_0", "compressed-tensors"), ("Q2_0", "gptq"), ("Q4_1", "mlx"), ("MXFP4", "mlx"),
    ("NVFP4", "modelopt"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "to"), THERE)
def test_there_and_back_the_blocks_are_the_same_and_the_values_ggmls(kind, to, files, tmp_path):
    file, out = files(kind), tmp_path / "out"
    done = export(str(file), out, f"{to}:embeddings=float", check=kind == "Q4_0")
    assert done["outcomes"].get(EXACT, 0) + done["outcomes"].get(FACTOR, 0) == 7
    export(str(out), tmp_path / "back.gguf", "gguf" if kind == "NVFP4" else f"gguf:{kind}", check=False)
    assert blocks(tmp_path / "back.gguf") == blocks(file) and len(blocks(file)) == 7
    llmq.dequantize(file, tmp_path / "floats", dtype="float32", warn=print)  # by gguf-py, rows of q and k in order
    llmq.dequantize(out, tmp_path / "again", dtype="float32", warn=print)
    want, got = (load_file(tmp_path / d / "model.safetensors") for d in ("floats", "again"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want if ".layers." in n or n.endswith("norm.weight"))
    text = "the first city </s> 12"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == make_tokenizer(bos=False)(text).input_ids


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K"])
def test_superblocks_go_where_float32_scales_do(kind, files, tmp_path):
    to = "mlx" if kind == "Q4_K" else "compressed-tensors"
    assert export(str(files(kind)), tmp_path / "out", to, embeddings="float")["outcomes"][EXACT] == 7
    floats = llmq.dequantize(files(kind), tmp_path / "floats", dtype="float32", warn=print)
    assert floats["decoded"]["weights"][kind] >= 7
    want, got = logits(tmp_path / "floats"), logits(tmp_path / "out", backend="reference")
    assert (want - got).norm() < 0.02 * want.norm()  # embedding and head are in float16 there


@pytest.mark.parametrize(
    ("kind", "to", "said"),
    [
        ("Q4_1", "gptq", r"q_proj: its codes cannot be kept: some of its minima are no multiple of their scale"),
        ("Q4_K", "compressed-tensors", r"q_proj: its codes cannot be kept: some of its minima"),
        ("Q6_K", "mlx", r"q_proj: its codes cannot be kept: group size 16 is no multiple of 32"),
        (
            "IQ4_NL",
            "gptq",
            r"cannot be kept: gptq holds integer grids, not IQ4_NL; or round it anew: --requantize GRID",
        ),
        ("Q4_0", "modelopt", r"modelopt has no name for Int weights group size 32"),
        ("MXFP4", "onnx", r"ONNX's MatMulNBits and DequantizeLinear hold integer codes, not Mxfp4"),
    ],
)
def test_what_a_target_does_not_hold_is_refused_by_name(kind, to, said, files, tmp_path):
    given = {} if to == "onnx" else {"embeddings": "float"}
    with pytest.raises(LlmqError, match=said):
        export(str(files(kind)), tmp_path / "out", to, **given)
    assert not list(tmp_path.iterdir())


def test_packed_embeddings_and_heads_are_refused_or_decoded_on_request(files, tmp_path):
    with pytest.raises(LlmqError, match=r"embed_tokens: .* say --embeddings float, or --to compressed-tensors"):
        export(str(files("Q8_0")), tmp_path / "out", "gptq")
    done = export(str(files("Q8_0")), tmp_path / "out", "gptq", embeddings="float")
    assert done["outcomes"] == {EXACT: 7, DECODED: 2}
    held = export(str(files("Q8_0")), tmp_path / "ct", "compressed-tensors")["outcomes"]
    assert held == {EXACT: 9}
    ends = [load_file(tmp_path / "out" / "model.safetensors")[f"{n}.weight"] for n in ("lm_head", "model.embed_tokens")]
    assert all(t.dtype == torch.float16 for t in ends)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_what_cannot_be_kept_is_rounded_on_request(files, tmp_path):
    done = export(str(files("IQ4_NL")), tmp_path / "out", "gptq", requantize="int:bits=4:group=32", embeddings="float")
    assert done["outcomes"] == {REQUANTIZED: 7, DECODED: 2}


def test_onnx_is_made_of_it_too(files, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(str(files("Q4_0")), tmp_path / "onnx", "onnx:qdq")
    llmq.dequantize(files("Q4_0"), tmp_path / "floats", dtype="float32", warn=print)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", options)
    feeds = {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}
    feeds["position_ids"] = torch.arange(IDS.shape[1])[None].numpy()
    empty = {
        i.name: torch.zeros(1, i.shape[1], 0, i.shape[3]).numpy() for i in session.get_inputs() if "past" in i.name
    }
    (got,) = session.run(["logits"], {**feeds, **empty})
    want = logits(tmp_path / "floats")
    assert (torch.from_numpy(got) - want).norm() < 1e-4 * want.norm()


FAMILIES = {
    "gemma3_text": {"head_dim": 32, "sliding_window": 6, "num_hidden_layers": 2, "query_pre_attn_scalar": 32},
    "qwen3_moe": {
        "norm_topk_prob": True,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_architectures_compute_what_the_file_says(kind, tmp_path):
    """Norms of 1 + w, experts in one tensor, fused linears, tied heads."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(
        kind, **(sizes | heads | {"bos_token_id": 0, "initializer_range": 0.2} | FAMILIES[kind])
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    make_tokenizer(bos=False).save_pretrained(tmp_path / "m")
    llmq.quantize(tmp_path / "m", tmp_path / "x.gguf", type="Q4_0", embeddings="F16", method="rtn", warn=print)
    export(str(tmp_path / "x.gguf"), tmp_path / "out", "compressed-tensors", check=kind == "gemma3_text")
    llmq.dequantize(tmp_path / "x.gguf", tmp_path / "floats", dtype="float32", warn=print)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out", backend="reference"), want, rtol=1e-4, atol=1e-4)


def test_a_file_without_codes_one_of_the_same_kind_and_junk_are_refused(files, tiny_checkpoint, tmp_path):
    llmq.quantize(tiny_checkpoint(), tmp_path / "f.gguf", type="F16", method="rtn", warn=print)
    (tmp_path / "cut.gguf").write_bytes(files("Q4_0").read_bytes()[:-40])
    for src, out, said in (
        (tmp_path / "f.gguf", ["out", "--to", "gptq"], "holds floats alone; write it with --to float"),
        (files("Q4_0"), ["out.gguf"], "is a GGUF file already"),
        (tmp_path / "cut.gguf", ["out", "--to", "gptq"], "is truncated or damaged"),
        (tmp_path / "none.gguf", ["out", "--to", "gptq"], "is not a file"),
        (files("Q4_0"), ["out", "--to", "mlx", "--embeddings", "Q8_0"], "--embeddings means nothing here"),
    ):
        done = CliRunner().invoke(cli.app, ["export", str(src), str(tmp_path / out[0]), *out[1:]])
        assert isinstance(done.exception, LlmqError) and said in str(done.exception), done.exception
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Q4_0", "Q2_0", "Q8_0", "Q4_1", "Q3_K", "Q2_K", "Q5_K"])
def test_every_block_means_what_ggml_makes_of_it(kind):
    """Also one of zeros, which has no scale, and one that is all of one value."""
    W_NK = torch.randn(4, 512)
    W_NK[1], W_NK[2, :256] = 0, 0.5
    grid = kinds.grid(kind)
    params = grid.fit(W_NK)
    codes = grid.nearest(W_NK, params.columns(512)).to(torch.uint8)
    rows = grid.to_bytes(codes, params)
    q = unpacked(rows, kind)
    stored = grid.from_bytes(rows)
    want = grid.decode(stored[0], stored[1].columns(512))
    assert torch.equal(q.dequantize(), want) and (q.params.scale != 0).all()
    assert q.grid == grid_of(kind)


def test_levels_of_q2_0_are_turned_round_where_symmetric_codes_do_not_reach():
    grid = kinds.grid("Q2_0")
    for top, sign in ((3, -1), (2, 1)):
        codes = torch.arange(64)[None].remainder(top + 1).to(torch.uint8)
        params = grid.from_bytes(torch.cat([torch.tensor([[0, 60]]), torch.zeros(1, 16)], 1).to(torch.uint8))[1]
        q = unpacked(grid.to_bytes(codes, params), "Q2_0")
        assert q.grid == Int(2, True, 64) and Params.of(q.params).zero.eq(2).all()
        assert q.params.scale.item() == sign * 1.0
        assert torch.equal(q.dequantize(), codes.float() - 1)
