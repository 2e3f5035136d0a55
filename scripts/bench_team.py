"""Several processes against one: the same bytes, what they compute, what they send each other.

    python scripts/bench_team.py MODEL --calib FILE [--blocks 6] [--sizes 1 2 4] [--only gptq balanced] [--threads]

MODEL is cut to its first blocks. Each recipe is run by teams of processes on this machine (gloo), of one thread each;
the table shows the sha256 of what they wrote, the CPU seconds of each process in a block, and the bytes that each
received in a block beside those that docs/scale.md tells. The first block is not timed, as compiled loops are loaded in
it. With --threads one process of as many threads stands beside each team.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

W8A8 = {"bits": 8, "act_bits": 8, "group_size": "channel", "format": "compressed-tensors"}
RECIPES: dict[str, dict[str, object]] = {
    "gptq": {"method": "gptq", "range": "mse"},
    "balanced": {"quality": "balanced"},
    "awq": {"method": "awq,rtn", "format": "awq"},
    "smoothquant W8A8": {"method": "smoothquant,gptq", **W8A8},
    "best": {"quality": "best"},
    "GGUF Q4_K_M": {"type": "Q4_K_M"},
    "balanced, a mixture of experts": {"quality": "balanced", "group_size": 32, "format": "gptq"},
}


def cut(model: Path, blocks: int, out: Path) -> Path:
    """Write the first blocks of a checkpoint as a checkpoint."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    kept = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dictionary
                _, _, rest = name.partition("layers.")
                if not rest or int(rest.split(".")[0]) < blocks:
                    kept[name] = tensors.get_tensor(name)
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


def child(job: dict[str, object]) -> None:
    """Be one process: run, and print the CPU seconds in the blocks and the bytes that came in."""
    import torch

    import llmq
    from llmq import launched, team
    from llmq.pipeline import run

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    seconds, came = 0.0, 0
    solve, reduced, sent = run.quantize_block, team.Group._reduced, team.Group._sent

    def timed(*args: object) -> object:
        nonlocal seconds
        began = time.process_time()
        found = solve(*args)
        seconds += time.process_time() - began if args[1] else 0.0
        return found

    def summed(self: team.Group, total: torch.Tensor, mine: torch.Tensor, *how: object) -> torch.Tensor:
        nonlocal came
        owned = how[1] is not None
        came += (self.size - 1) * (mine.nbytes if owned else 2 * mine.nbytes // self.size)
        return reduced(self, total, mine, *how)

    def dealt(self: team.Group, i: int, *args: object) -> dict[str, torch.Tensor]:
        nonlocal came
        found = sent(self, i, *args)
        came += sum(t.nbytes for t in found.values()) if i % self.size != self.rank else 0
        return found

    run.quantize_block, team.Group._reduced, team.Group._sent = timed, summed, dealt  # type: ignore[assignment]
    record = llmq.quantize(job["src"], job["out"], calib=job["calib"], **job["options"], warn=str, overwrite=True)
    if launched.leads():
        print(json.dumps({"linears": list(record["linears"])}), flush=True)
    print(json.dumps({"cpu": seconds, "came": came}), flush=True)


def team_of(size: int, threads: int, job: dict[str, object]) -> list[dict[str, float]]:
    """Run a job by so many processes; return what each said."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    own = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    running = [
        subprocess.Popen(  # noqa: S603
            command, env=os.environ | own | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(size)
    ]
    said = [p.communicate()[0].decode().splitlines() for p in running]
    if any(p.returncode for p in running):
        sys.exit(f"a process of {size} failed")
    return [json.loads(lines[-1]) for lines in said]


def sha256(out: Path) -> str:
    """Return the digest of the weights that were written."""
    files = [out] if out.is_file() else sorted(out.glob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def expected(src: Path, size: int, batches: int, *, paired: bool) -> float:
    """Return the bytes that docs/scale.md says each process receives in a block of a Llama or a Mixtral."""
    config = json.loads((src / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv, experts = hidden * config.get("num_key_value_heads", heads) // heads, config.get("num_local_experts", 0)
    attention, mlp = [(hidden, hidden + 2 * kv), (hidden, hidden)], [(hidden, 2 * inner), (inner, hidden)]
    shared, owned = attention + (mlp if not experts else []), mlp * experts
    each = 4 * (9 / 16 + (2 + 9 / 16) * paired)
    layer = 4 * 9 / 16 * hidden**2 if experts else 0.0  # H of all that enters it, which stands in where tokens are few
    sums = 2 * (sum(each * K * K for K, _ in shared) + layer) + sum(each * K * K for K, _ in owned)
    codes = sum(N * K for K, N in shared + owned)
    return (size - 1) / size * (math.ceil(min(8, batches) / size) * sums + codes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--blocks", type=int, default=6, help="2 at least")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", default=list(RECIPES))
    parser.add_argument("--threads", action="store_true")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        src = cut(args.model, args.blocks, root / "src")
        print("| recipe | processes x threads | sha256 | CPU s a block, each | MB received a block | by formula |")
        print("|---|---|---|---|---|---|")
        for name in args.only:
            options = {"samples": args.samples, "seq_len": args.seq_len, "dtype": "float32", "device": "cpu"}
            options |= {"group_size": 64} | RECIPES[name]
            source, blocks = src, args.blocks
            if "experts" in name:
                from _families import FAMILIES

                source, blocks = root / "experts", 2
                if not source.exists():
                    FAMILIES["mixtral"].save(source)
            out = root / ("out.gguf" if "GGUF" in name else "out")
            if "GGUF" in name:
                del options["group_size"]
            teams = [(size, 1) for size in args.sizes]
            teams += [(1, size) for size in args.sizes if size > 1] if args.threads else []
            for size, threads in teams:
                job = {"src": str(source), "out": str(out), "calib": str(args.calib), "options": options}
                said = team_of(size, threads, job)
                cpu = ", ".join(f"{s['cpu'] / (blocks - 1):.2f}" for s in said)
                came = sum(s["came"] for s in said) / size / blocks / 1e6
                batches = math.ceil(args.samples / (4096 // args.seq_len))
                told = expected(source, size, batches, paired="balanced" in name or name == "best") / 1e6
                print(f"| {name} | {size} x {threads} | {sha256(out)} | {cpu} | {came:.2f} | {told:.2f} |", flush=True)


if __name__ == "__main__":
    main()
