"""Decode, prefill, bytes and cache of quantized models on the CPU, beside the float models in the same run.

    python scripts/bench_runtime.py shapes [--smollm2 DIR] [--out DIR]       decode and prefill, weights' bytes
    python scripts/bench_runtime.py cache MODEL --text FILE                  bytes and chunked perplexity at 8192 tokens
    python scripts/bench_runtime.py crossover                                packed and decoded products, by rows
    python scripts/bench_runtime.py floats                                   small floats beside the reference, by rows

`shapes` measures a random Llama of TinyLlama-1.1B's shape and, where given, a model of scripts/make_reference_model.py.
All models of a row are in memory at once and take turns, so that a ratio is of neighbours in time: the median over the
rounds. `--clock cpu --threads 1` counts this process's processor time in place of wall time, for machines that others
use too. `--llama-python` names a Python that has `xllamacpp`; llama.cpp then runs the same checkpoint, as Q4_0, in a
process of its own; so does `--gptqmodel-python`, with a GPTQ checkpoint on GPTQModel's CPU kernels and the float32
model beside it. Figures go to docs/runtime.md by hand.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _measure as measure
import _speed
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import llmq
from llmq.integrations.cache import packed_attention
from llmq.runtime.linear import QuantLinear

TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
SCHEMES = {
    "int4 g64": ("--bits", 4, "--group-size", 64, "--format", "compressed-tensors"),
    "int8 channel": ("--bits", 8, "--group-size", "channel", "--format", "compressed-tensors"),
    "nvfp4": ("--weights", "nvfp4", "--format", "compressed-tensors"),
    "fp8": ("--weights", "fp8", "--format", "compressed-tensors"),
    "w8a8": ("--bits", 8, "--act-bits", 8, "--group-size", "channel", "--format", "compressed-tensors"),
}


def clock(kind: str) -> Callable[[], float]:
    """Return a clock in seconds: the wall's, or this process's processor time."""
    return time.perf_counter if kind == "wall" else time.process_time


def random_llama(folder: Path, blocks: int, shape: dict[str, Any] = TINYLLAMA) -> Path:
    """Write a random checkpoint of a shape with so many blocks, unless it is there; bfloat16."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(**shape | {"num_hidden_layers": blocks})
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():  # of bytes and one merge: the rivals load no model without them
        words = Tokenizer(BPE({c: i for i, c in enumerate([*sorted(ByteLevel.alphabet()), "th"])}, [("t", "h")]))
        words.pre_tokenizer = ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def models(source: Path, out: Path, only: list[str], compiled: bool) -> dict[str, Any]:
    """Return float and quantized models of one checkpoint by name, quantizing (RTN) what is not there yet."""
    found: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        if not only or name in only or name == "float32":
            found[name] = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    for name, options in SCHEMES.items():
        if only and name not in only:
            continue
        folder = quantized(out / f"{source.name}-{name.replace(' ', '-')}", source, *options)
        found[name] = llmq.load(folder, dtype=torch.float32, device="cpu")
    if compiled:
        for model in found.values():
            model.forward = torch.compile(model.forward, dynamic=True)
    return found


def quantized(out: Path, source: Path, *options: object) -> Path:
    """Return `out`, a checkpoint of `source`, rounded to nearest unless it is there."""
    if not out.exists():
        measure.llmq("quantize", source, out, "--method", "rtn", *options)
    return out


def weight_bytes(model: Any) -> tuple[int, int, int, int]:
    """Return the bytes of the quantized linears and of the whole model, each followed by those in bfloat16."""
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    packed = sum(sum(t.nbytes for t in m.buffers()) + _hidden_bytes(m) for m in linears)
    as_bfloat16 = sum(2 * m.in_features * m.out_features for m in linears)
    inside = {id(p) for m in linears for p in m.parameters()}
    rest = sum(2 * p.numel() for p in model.parameters() if id(p) not in inside)
    return packed, as_bfloat16, packed + rest, as_bfloat16 + rest


def _hidden_bytes(linear: QuantLinear) -> int:
    """Return what a back-end holds outside torch's tensors: fbgemm's packed int8 weight."""
    return linear.in_features * linear.out_features if linear.backend == "fbgemm" else 0


def shapes(args: argparse.Namespace) -> None:
    """Measure decode and prefill of every model, in turns."""
    now = clock(args.clock)
    sources = [
        random_llama(args.out / f"random-tinyllama-{args.blocks}", args.blocks),
        *([args.smollm2] if args.smollm2 else []),
    ]
    print(f"{measure.machine()}; {args.threads} threads, {args.clock} time, {'compiled' if args.compile else 'eager'}")
    for source in sources:
        found = models(source, args.out, args.only, args.compile)
        ids = _speed.token_ids(next(iter(found.values())).config.vocab_size)
        speed: dict[tuple[str, str], list[float]] = {}
        for turn in range(args.rounds + 1):
            for name, model in found.items():
                rows = {"decode": _speed.decode(model, ids, args.new, now)}
                if name != "bfloat16" or args.slow:
                    rows["prefill"] = _speed.prefill(model, ids, now)
                for what, value in rows.items():
                    speed.setdefault((name, what), []).extend([value] if turn else [])  # the first turn warms up
        _print(source.name, found, speed)
        found.clear()
        gc.collect()
        if args.gptqmodel_python:
            _gptqmodel(args, source)
        if args.llama_python:
            _llama(args, source)


def _print(title: str, found: dict[str, Any], speed: dict[tuple[str, str], list[float]]) -> None:
    columns = [("decode", ("float32", "bfloat16")), ("prefill", ("float32",))]
    heads = [h for what, bases in columns for h in (f"{what} tok/s", *(f"x {b}" for b in bases))]
    print(f"\n{title}\n| model | back-ends | {' | '.join(heads)} | linears | model |\n{'|---' * (len(heads) + 4)}|")
    for name, model in found.items():
        cells = []
        for what, bases in columns:
            values = speed.get((name, what), [])
            cells.append(f"{statistics.median(values):.2f}" if values else "")
            for base in (speed.get((b, what), []) for b in bases):
                both = list(zip(values, base, strict=False))  # of neighbours in time
                cells.append(f"{statistics.median(a / b for a, b in both):.2f}" if both else "")
        used = sorted({m.backend for m in model.modules() if isinstance(m, QuantLinear)})
        packed, bf16, whole, whole_bf16 = weight_bytes(model)
        cells += [f"{packed / bf16:.3f}", f"{whole / whole_bf16:.3f}"] if used else ["", ""]
        print(f"| {name} | {', '.join(used)} | {' | '.join(cells)} |", flush=True)


_LLAMA = """
import json, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 1024, int(sys.argv[2])
server = xllamacpp.Server(params)
ask = {"prompt": list(range(3, 3 + int(sys.argv[3]))), "n_predict": int(sys.argv[4]), "temperature": 0,
       "ignore_eos": True, "cache_prompt": False}
answers = [server.handle_completions(ask) for _ in range(int(sys.argv[5]))]
print(json.dumps([(json.loads(a) if isinstance(a, str) else a)["timings"] for a in answers[1:]]))
"""


def _llama(args: argparse.Namespace, source: Path) -> None:
    """Print what llama.cpp makes of the same checkpoint as Q4_0, by its own wall clock."""
    gguf = quantized(args.out / f"{source.name}.Q4_0.gguf", source, "--format", "gguf", "--type", "Q4_0")
    asked = (_speed.PROMPT, args.new, "predicted_per_second"), (_speed.PREFILL, 1, "prompt_per_second")
    for prompt, new, key in asked:
        words = [args.llama_python, "-c", _LLAMA, gguf, args.threads, prompt, new, args.rounds + 1]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=True)  # noqa: S603
        timings = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"llama.cpp Q4_0, {key}: {statistics.median(t[key] for t in timings):.2f} (wall)")


def _gptqmodel(args: argparse.Namespace, source: Path) -> None:
    """Print what GPTQModel's CPU kernels make of a GPTQ checkpoint of the same grid, beside float32 in turns."""
    options = ("--bits", 4, "--group-size", 64, "--format", "gptq")
    folder = quantized(args.out / f"{source.name}-gptq-int4-g64", source, *options)
    driver = Path(__file__).with_name("peer_runtime_gptqmodel.py")
    settings = ("--threads", args.threads, "--new", args.new, "--rounds", args.rounds)
    ran = measure.run(args.gptqmodel_python, driver, folder, source, *settings)
    found = json.loads(ran.output.strip().splitlines()[-1])
    for what in ("decode", "prefill"):
        speed = statistics.median(theirs for theirs, _ in found[what])
        ratio = statistics.median(theirs / float32 for theirs, float32 in found[what])
        kernels = f"gptqmodel {found['version']}, {', '.join(found['kernels'])}"
        print(f"{kernels}, {what}: {speed:.2f} tok/s (wall), {ratio:.2f} x float32 beside it")


def cache(args: argparse.Namespace) -> None:
    """Print bytes and chunked perplexity of quantized caches beside a float one."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    config, T = model.config, args.tokens
    ids = torch.tensor([tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"][: T + 1]])
    if ids.shape[1] <= T:
        sys.exit(f"{args.text} holds {ids.shape[1]} tokens, {T + 1} are needed")
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bf16 = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * D * T
    print(f"{T} tokens in pieces of 32; bytes beside a bfloat16 cache of {bf16 / 1e6:.1f} MB, float window counted")
    base = _loss(model, ids, DynamicCache(config=config))
    print(
        f"| cache | bytes | perplexity | over float |\n|---|---|---|---|\n| float | 1 | {_exp(base):.4f} | |",
        flush=True,
    )
    for options in ({"bits": 8}, {"bits": 4}, {"bits": 4, "keys": "token"}, {"bits": 2}):
        made = llmq.QuantizedCache(config, **options)
        with packed_attention(model):
            loss = _loss(model, ids, made)
        name = ", ".join(f"{k}={v}" for k, v in options.items())
        change = 100 * (_exp(loss - base) - 1)
        print(f"| {name} | {made.nbytes / bf16:.4f} | {_exp(loss):.4f} | {change:+.3f} % |", flush=True)


@torch.inference_mode()
def _loss(model: Any, ids: torch.Tensor, kv: Any, step: int = 32) -> float:
    total, T = 0.0, ids.shape[1] - 1
    for i in range(0, T, step):
        logits = model(ids[:, i : min(i + step, T)], past_key_values=kv).logits[0].float()
        total += F.cross_entropy(logits, ids[0, i + 1 : i + 1 + len(logits)], reduction="sum").item()
    return total / T


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())


def crossover(args: argparse.Namespace) -> None:
    """Print milliseconds of the packed and of the decoded product of each weight-only back-end, by rows of x."""
    from llmq.formats.compressed_tensors import CompressedTensors
    from llmq.grids.int import Int
    from llmq.runtime import backends
    from llmq.runtime.backends import int4pack, int8pack, intloop
    from llmq.types import LinearSpec, QTensor, Scheme

    now, (N, K) = clock(args.clock), (2048, 5632)
    print(f"{measure.machine()}; N {N}, K {K}, {args.threads} threads, {args.clock} ms, least of {args.rounds}")
    W = torch.randn(N, K)

    def weight(grid: Int, activation: Int | None = None) -> tuple[QTensor, LinearSpec]:
        params = grid.fit(W)
        q = QTensor(grid.nearest(W, params.columns(K)).to(torch.uint8), params, grid)
        return q, LinearSpec("x", N, K, Scheme(grid, activation))

    four = weight(Int(4, True, 64, scale_dtype=torch.bfloat16))
    of_eight = weight(Int(8, True, "channel", scale_dtype=torch.bfloat16))
    pack, eight = int4pack.Int4Pack(*four), int8pack.Int8Pack(*of_eight)
    loops = {bits: intloop.IntLoop(*weight(Int(bits, True, 64, scale_dtype=torch.bfloat16))) for bits in (2, 3, 4)}
    loops[8] = intloop.IntLoop(*of_eight)
    w8a8 = weight(Int(8, True, "channel", restricted=True, scale_dtype=torch.bfloat16), Int(8, True, "channel"))
    layer = QuantLinear(CompressedTensors(), w8a8[1])
    layer.load_state_dict(CompressedTensors().pack(*w8a8), assign=True)
    layer.prepack()
    runs: dict[str, Callable[[Any], Any]] = {
        "float32": lambda x: F.linear(x, W),
        **{f"int{b} loop": lambda x, w=w: _loop(intloop.dot_product, w, x) for b, w in loops.items()},
        "int4 loop, decoded": lambda x: _loop(intloop.decoded_product, loops[4], x),
        "int4 pack": lambda x: int4pack.packed_product(x, pack.codes, pack.sz, pack.group),
        "int4 pack, decoded": lambda x: int4pack.decoded_product(x, pack.codes, pack.sz, pack.residual, pack.group),
        "int8 pack": lambda x: int8pack.packed_product(x.bfloat16(), eight.w, eight.scale),
        "int8 pack, decoded": lambda x: int8pack.decoded_product(x, eight.w, eight.scale.float()),
        f"w8a8 ({layer.backend})": layer,
    }
    print(f"| rows | {' | '.join(runs)} |\n|{'---|' * (len(runs) + 1)}")
    for rows in (1, 4, 8, 16, 32, 64, 128, 512):
        x = torch.randn(rows, K)
        cells = [_least(lambda run=run, x=x: run(x), args.rounds, now) for run in runs.values()]
        print(f"| {rows} | {' | '.join(f'{1e3 * c:.2f}' for c in cells)} |", flush=True)
    print(f"rows up to which the first of two is used: intloop {intloop.FEW}, the others {backends.many_rows()}")


def floats(args: argparse.Namespace) -> None:
    """Print milliseconds of layers of small floats: float32, the reference and the loops, by rows."""
    from llmq.grids.fp8 import Fp8
    from llmq.grids.mxfp4 import Mxfp4
    from llmq.grids.mxfp8 import Mxfp8
    from llmq.grids.nvfp4 import Nvfp4
    from llmq.runtime import reference
    from llmq.runtime.backends.floatloop import FloatLoop
    from llmq.types import LinearSpec, QTensor, Scheme

    now, (N, K) = clock(args.clock), (args.size, args.size)
    print(f"{measure.machine()}; N = K = {N}, {args.threads} threads, {args.clock} ms, least of {args.rounds}")
    print("| grid | rows | float32 | reference | floatloop |\n|---|---|---|---|---|")
    W = torch.randn(N, K)
    for grid in (Nvfp4(), Mxfp4(), Fp8(), Fp8("128x128"), Mxfp8()):
        q = QTensor.rounded(W, grid)
        w = FloatLoop(q, LinearSpec("x", N, K, Scheme(grid)))
        for rows in (1, 8, 64, 512):
            x = torch.randn(rows, K)
            runs = (lambda x=x: F.linear(x, W), lambda x=x, q=q: reference.linear(x, q, None), lambda x=x, w=w: w(x))
            cells = (f"{1e3 * _least(run, args.rounds, now):.2f}" for run in runs)
            name = f"{type(grid).__name__.lower()} {grid.granularity}"
            print(f"| {name} | {rows} | {' | '.join(cells)} |", flush=True)


def _loop(product: Callable[..., Any], w: Any, x: torch.Tensor) -> Any:
    return product(x, w.words, w.scale, w.zero, w.field)


@torch.inference_mode()
def _least(run: Callable[[], Any], rounds: int, now: Callable[[], float]) -> float:
    run()
    times = []
    for _ in range(rounds):
        began = now()
        run()
        times.append(now() - began)
    return min(times)


def main() -> None:
    """Parse, set the threads and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one, two, three, four = (commands.add_parser(name) for name in ("shapes", "cache", "crossover", "floats"))
    for command, run in ((one, shapes), (two, cache), (three, crossover), (four, floats)):
        command.set_defaults(run=run)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--clock", choices=["wall", "cpu"], default="wall")
        command.add_argument("--rounds", type=int, default=5)
    one.add_argument("--smollm2", type=Path, help="a model of make_reference_model.py")
    one.add_argument("--out", type=Path, default=Path("bench"))
    one.add_argument("--only", nargs="+", default=[], help=f"of float32, bfloat16, {', '.join(SCHEMES)}")
    one.add_argument("--blocks", type=int, default=22, help="of the random model; the output head weighs more in fewer")
    one.add_argument("--new", type=int, default=_speed.NEW)
    one.add_argument("--compile", action="store_true", help="torch.compile on every side")
    one.add_argument("--slow", action="store_true", help="bfloat16 prefill too, which takes minutes without AMX")
    one.add_argument("--llama-python", type=Path, help="a Python that has xllamacpp")
    one.add_argument("--gptqmodel-python", type=Path, help="a Python that has gptqmodel")
    two.add_argument("model", type=Path)
    two.add_argument("--text", type=Path, required=True)
    two.add_argument("--tokens", type=int, default=8192)
    four.add_argument("--size", type=int, default=1024, help="features of the layers, in and out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
