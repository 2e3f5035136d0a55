"""`llmq plan`: the options of `quantize`, its refusals with the same lines, and what is shown and written."""

import inspect
import json

import predict
import pytest
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.commands.terminal import console
from llmq.recipe import KINDS

SMALL = ["--group-size", "32", "--samples", "4", "--seq-len", "32"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Lines are not broken, whatever console an earlier test has made."""
    monkeypatch.setattr(console, "width", 400)


def plan(*args):
    return CliRunner().invoke(cli.app, ["plan", *map(str, args)])


def test_it_takes_what_quantize_takes_but_for_what_writes():
    own, shared = (inspect.signature(f).parameters for f in (cli.plan, cli.quantize))
    assert [n for n in shared if n not in own] == ["verify", "report", "log_json"]
    assert set(own) - set(shared) == {"devices", "device_like", "linears", "json_file"}
    assert all(own[n] == shared[n] for n in shared if n in own and n != "out")
    assert {n.rstrip("_") for n in own} >= KINDS.keys()


def test_what_is_found_is_shown_and_written(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, file = tiny_checkpoint(), tmp_path / "plan.json"
    done = plan(folder, *SMALL, "--bits", 3, "--json", file, "--linears")
    assert done.exit_code == 0, done.exception
    said = json.loads(file.read_text())
    assert said["bytes"] < said["float_bytes"] and len(said["linears"]) == 14 and said["warnings"]
    for text in ("3-bit gptq is read by GPTQModel", "14 matrices", "host memory at most", "probed here", "TensorRT-LLM",
                 "model.layers.1.mlp.up_proj", "disk meanwhile", "bits per quantized weight"):  # fmt: skip
        assert text in done.output, text
    assert list(tmp_path.iterdir()) == [file]
    assert (
        plan(folder, *SMALL, "--json", file).exit_code
        and plan(folder, *SMALL, "--json", file, "--overwrite").exit_code == 0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 48}, {"bits": 9}, {"group_size": 32, "runtime": "vllm", "bits": 3},
        {"method": "rtn,signround", "samples": 1, "group_size": 32}, {"group_size": 32, "runtime": "mlx"},
    ],
)  # fmt: skip
def test_what_quantize_would_refuse_is_refused_with_its_line(tiny_checkpoint, tmp_path, options):
    folder = tiny_checkpoint()
    with pytest.raises(llmq.LlmqError) as said:
        llmq.quantize(folder, tmp_path / "out", **options)
    with pytest.raises(llmq.LlmqError) as e:
        llmq.plan(folder, tmp_path / "out", **options)
    assert str(e.value) == str(said.value)
    flags = [f for n, v in options.items() for f in ("--" + {"runtime": "for"}.get(n, n).replace("_", "-"), v)]
    done = plan(folder, tmp_path / "out", *flags)
    assert done.exit_code == 1 and str(done.exception) == str(said.value)


def test_out_says_gguf_and_is_refused_as_quantize_refuses_it(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(), tmp_path / "m.gguf"
    found = llmq.plan(folder, out, type="Q8_0", method="rtn", seconds=0.1, runtime="llama.cpp")
    assert found.format.startswith("gguf") and [r.accepts for r in found.readers if r.runtime == "llama.cpp"] == [True]
    out.write_bytes(b"GGUF")
    with pytest.raises(llmq.LlmqError, match="exists; give another name or --overwrite"):
        llmq.plan(folder, out, type="Q8_0", method="rtn")
    with pytest.raises(llmq.LlmqError, match=r"^llama\.cpp October 2026 does not take this: it reads GGUF.*--format"):
        llmq.plan(folder, group_size=32, runtime="llama.cpp")


def test_a_disk_that_is_too_small_is_said_before(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.checkpoint.place.shutil.disk_usage", lambda _: type("Disk", (), {"free": 1000})())
    with pytest.raises(llmq.LlmqError, match=r"out needs 0\.\d GB of disk, 0\.0 GB are free; make room"):
        llmq.plan(tiny_checkpoint(), tmp_path / "out", group_size=32)


def test_machines_that_are_not_there_are_predicted_on_paper(tiny_checkpoint):
    done = plan(tiny_checkpoint(), *SMALL, "--device-like", "h100", "--devices", 8)
    assert done.exit_code == 0, done.exception
    assert "arithmetic: h100, 8 processes" in done.output and "device memory at most" in done.output


def test_a_device_beside_a_machine_that_is_not_there_is_refused(tiny_checkpoint):
    done = plan(tiny_checkpoint(), *SMALL, "--device-like", "h100", "--device", "cuda:7")
    assert done.exit_code == 1 and "leave out --device cuda:7" in str(done.exception)


def test_quantize_says_it_in_one_line_before_it_starts(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(), tmp_path / "out"
    done = CliRunner().invoke(
        cli.app, ["quantize", str(folder), str(out), "--method", "rtn", "--group-size", "32", "--for", "vllm"]
    )
    assert done.exit_code == 0, done.exception
    (line,) = [x for x in done.output.splitlines() if x.startswith("plan: ")]
    assert (
        " MB become " in line and " bits a weight; at most " in line and line.index("plan") < done.output.index("out")
    )


def test_a_cap_on_memory_lets_fewer_batches_wait_and_is_refused_as_quantize_refuses_it(tiny_checkpoint, tmp_path):
    options = {"group_size": 32, "method": "gptq", "samples": 1024, "seq_len": 32, "seconds": 0.1}
    folder = tiny_checkpoint()
    free = llmq.plan(folder, **options)
    host = free.memory["host"]
    blocks = host["terms"].get("suspended", 0)
    capped = llmq.plan(folder, max_memory=f"{(host['bytes'] - blocks // 2) // 1000}K", **options)
    assert capped.alive < free.alive == free.batches and capped.memory["host"]["bytes"] < host["bytes"]
    with pytest.raises(llmq.LlmqError, match="^--max-memory 0.001 GB is too little: "):
        llmq.plan(folder, max_memory="1M", **options)


def test_models_that_are_not_here_are_planned_from_their_configs(tmp_path):
    small = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 16, "vocab_size": 1024}
    predict.hollow(tmp_path / "m", predict.MODELS["deepseek-671b"] | small)
    found = llmq.plan(tmp_path / "m", device_like="h100", devices=64)
    assert sum(".experts." in r.name for r in found.linears) == 3 * 16 and found.float_bytes > 10**9
    held = sum(f.stat().st_blocks * 512 for f in (tmp_path / "m").iterdir())
    assert held < 10**6  # the weights are a hole
