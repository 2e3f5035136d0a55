"""What the fuzzer reads: valid inputs made on the spot, which of their files are mutated, the commands that read them.

Not here: how files are mutated (_mutate.py), running (fuzz.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _mutate as mutate
import _narrow
from _rewriting import rewrite_gguf

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
RTN = ("--method", "rtn", "--group-size", "32", "--overwrite")
GPTQ = ("--method", "gptq", "--group-size", "32", "--samples", "2", "--seq-len", "16", "--overwrite")
GGUF = ("--method", "rtn", "--format", "gguf:pre=gpt-2", "--type", "Q8_0", "--overwrite")
EVAL = ("--text", "{text}", "--window", "16", "--windows", "1")
RECIPE = """\
method: gptq
bits: 4
group_size: 32
sym: true
range: mse
samples: 2
seq_len: 16
seed: 0
dtype: float32
format: gptq
override: ['down_proj:bits=4']
skip: ['layers\\.0\\.mlp']
lm_head: false
"""
CHAT = {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "the quick fox"}]}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Reader:
    """Something that reads files: which of them are mutated and how, and the commands that read them.

    make: writes a valid input into a folder. files: pattern -> how to mutate what it matches.
    """

    make: Callable[[Path], None]
    files: dict[str, tuple[mutate.Mutation, ...]]
    commands: tuple[tuple[str, ...], ...]


def copy(*names: str) -> Callable[[Path], None]:
    """Return a maker that lays golden checkpoints over each other."""

    def make(folder: Path) -> None:
        for name in names:
            shutil.copytree(GOLDEN / name, folder / "m", dirs_exist_ok=True)

    return make


def sharded(folder: Path) -> None:
    """Write the float checkpoint in shards with an index."""
    from transformers import AutoModelForCausalLM

    copy("float")(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "m")
    for file in (folder / "m").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder / "m", max_shard_size="60KB")


def written(*options: str) -> Callable[[Path], None]:
    """Return a maker that quantizes the float checkpoint."""

    def make(folder: Path) -> None:
        copy("float")(folder)
        status, said, _ = llmq("quantize", folder / "m", folder / options[0], *options[1:])
        if status:
            raise RuntimeError(said)

    return make


def narrow(kind: str) -> Callable[[Path], None]:
    """Return a maker that packs the float checkpoint in narrow floats, as its makers would ship it."""

    def make(folder: Path) -> None:
        copy("float")(folder)
        _narrow.rewrite(folder / "m", kind)

    return make


def by_a_peer(folder: Path) -> None:
    """Write a GGUF file without llmq's records, whose checksums would refuse every change of it."""
    written("x.gguf", *GGUF)(folder)
    (folder / "x.gguf").rename(folder / "llmq.gguf")
    rewrite_gguf([folder / "llmq.gguf"], folder / "x.gguf", {})
    (folder / "llmq.gguf").unlink()


def texts(folder: Path) -> None:
    """Write one calibration text in every container, beside a checkpoint with a chat template."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy("float")(folder)
    (folder / "m" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"text": f"row {i}: the quick brown fox jumps over the lazy dog. " * 4} for i in range(30)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(40)))
    (folder / "t.txt").write_text("\n".join(row["text"] for row in rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "t.parquet")
    with pa.OSFile(str(folder / "t.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as out:
        out.write_table(table)


def recipe(folder: Path) -> None:
    """Write a checkpoint and a recipe for it."""
    copy("float")(folder)
    (folder / "r.yaml").write_text(RECIPE)


def imatrix(folder: Path) -> None:
    """Write a checkpoint and an importance matrix of it."""
    copy("float")(folder)
    options = ("--method", "gptq", *GGUF[2:], "--samples", "2", "--seq-len", "16", "--calib", str(text_file(folder)))
    llmq("quantize", folder / "m", folder / "x.gguf", *options, "--imatrix-out", folder / "i.gguf")
    (folder / "x.gguf").unlink()


def text_file(folder: Path) -> Path:
    """Return a plain calibration text."""
    file = folder / "plain.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return file


WEIGHTS = {"m/model.safetensors": (mutate.safetensors_file, mutate.safetensors_file, mutate.raw)}
CONFIG = {"m/config.json": (mutate.json_file,) * 5 + (mutate.raw,)}
PACKED = (
    ("eval", "{in}/m", *EVAL),
    ("export", "{in}/m", "{out}.gguf", "--pre", "gpt-2", "--overwrite"),
    ("inspect", "{in}/m"),
    ("dequantize", "{in}/m", "{out}", "--overwrite"),
    ("quantize", "{in}/m", "{out}", *RTN),
)


def packed(*names: str) -> Reader:
    """Return the reader of a peer's checkpoint: its config is mutated as often as its weights."""
    return Reader(copy("float", *names), WEIGHTS | CONFIG, (*PACKED, ("verify", "{in}/m")))


def packed_floats(kind: str) -> Reader:
    """Return the reader of a source in narrow floats."""
    commands = (
        ("quantize", "{in}/m", "{out}", *RTN),
        ("dequantize", "{in}/m", "{out}", "--overwrite"),
        ("inspect", "{in}/m"),
        ("eval", "{in}/m", *EVAL),
    )
    return Reader(narrow(kind), WEIGHTS | CONFIG, commands)


READERS = {
    "safetensors": Reader(copy("float"), WEIGHTS, (("quantize", "{in}/m", "{out}", *RTN), ("inspect", "{in}/m"))),
    "config": Reader(copy("float"), CONFIG, (("quantize", "{in}/m", "{out}", *RTN), ("eval", "{in}/m", *EVAL))),
    "index": Reader(
        sharded,
        {"m/*.index.json": (mutate.json_file, mutate.json_file, mutate.raw)},
        (("quantize", "{in}/m", "{out}", *RTN), ("inspect", "{in}/m"), ("eval", "{in}/m", *EVAL)),
    ),
    "gptq": packed("gptq_v1_w4g32_sym"),
    "gptq-order": packed("gptq_v1_w4g32_desc_act"),
    "awq": packed("awq_w4g32"),
    "compressed-tensors": packed("ct_pack_w4g32_asym"),
    "w8a8": packed("ct_int_w8a8_static"),
    "fp8": packed_floats("fp8-block"),
    "nvfp4": packed_floats("ct-nvfp4"),
    "gpt-oss": packed_floats("gpt-oss"),
    "tokenizer": Reader(
        copy("float"),
        {
            "m/tokenizer.json": (mutate.json_file, mutate.json_file, mutate.raw),
            "m/tokenizer_config.json": (mutate.json_file,),
        },
        (
            ("generate", "{in}/m", "hello", "--max-new-tokens", "1"),
            ("quantize", "{in}/m", "{out}", *GPTQ, "--calib", "{text}"),
            ("quantize", "{in}/m", "{out}.gguf", *GGUF),
        ),
    ),
    "gguf": Reader(
        written("x.gguf", *GGUF), {"x.gguf": (mutate.gguf_file, mutate.gguf_file, mutate.raw)},
        (
            ("inspect", "{in}/x.gguf", "--linears"), ("verify", "{in}/x.gguf"),
            ("dequantize", "{in}/x.gguf", "{out}", "--overwrite"),
        ),
    ),
    "gguf-peer": Reader(
        by_a_peer, {"x.gguf": (mutate.gguf_file, mutate.gguf_file, mutate.raw)},
        (("dequantize", "{in}/x.gguf", "{out}", "--overwrite"), ("verify", "{in}/x.gguf")),
    ),
    "imatrix": Reader(
        imatrix, {"i.gguf": (mutate.gguf_file, mutate.raw)},
        (("quantize", "{in}/m", "{out}.gguf", *GGUF, "--imatrix", "{in}/i.gguf"),),
    ),
    "recipe": Reader(
        recipe, {"r.yaml": (mutate.yaml_file,) * 3 + (mutate.raw,)},
        (("quantize", "{in}/m", "{out}", "--recipe", "{in}/r.yaml", "--calib", "{text}", "--overwrite"),),
    ),
    "record": Reader(
        written("q", *RTN), {"q/quantization.json": (mutate.json_file,) * 3 + (mutate.raw,)},
        (("inspect", "{in}/q", "--linears"), ("verify", "{in}/q")),
    ),
    "jsonl": Reader(
        texts,
        {"t.jsonl": (mutate.json_lines, mutate.raw), "c.jsonl": (mutate.json_lines, mutate.json_lines, mutate.raw)},
        (("quantize", "{in}/m", "{out}", *GPTQ, "--calib", "{file}"),),
    ),
    "columns": Reader(
        texts, {"t.parquet": (mutate.raw,), "t.arrow": (mutate.raw,)},
        (("quantize", "{in}/m", "{out}", *GPTQ, "--calib", "{file}"),),
    ),
}  # fmt: skip


def llmq(*args: object) -> tuple[int, str, str]:
    """Run the command line in this process; return its status (-1: an exception came out) and what it printed."""
    from llmq import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["llmq", *map(str, args)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(bool(e.code))
        except BaseException as e:  # noqa: BLE001, none may leave `main`, a Rust panic either: each is a finding
            return -1, f"{type(e).__name__}: {e}", out.getvalue()
    return status, err.getvalue(), out.getvalue()
