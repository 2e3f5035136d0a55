"""llmq and GPTQModel side by side: the same model, calibration text and cores, in turn, and the ratio.

    python scripts/bench_peer.py MODEL --peer-python ENV/bin/python --calib FILE --text FILE [--rounds 2]

ENV is the environment that scripts/interop.sh builds. GPTQModel compiles kernels at its first use: warm it up once.
Each calibrates on the same 32 windows of 512 tokens. Both checkpoints are scored by llmq's decoder.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import _measure as measure

OPTIONS = ("--bits", 4, "--group-size", 64)
SAMPLES, SEQ_LEN = 32, 512


def main() -> None:
    """Alternate the two, then print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", required=True, type=Path)
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ours, peers = args.out / "llmq-w4g64", args.out / "gptqmodel-w4g64"
    peer = Path(__file__).with_name("peer_gptqmodel.py")
    taken: dict[str, list[measure.Measured]] = {"llmq": [], "GPTQModel": []}
    calib = ("--calib", args.calib, "--samples", SAMPLES, "--seq-len", SEQ_LEN)
    tokens = measure.write_tokens(args.out / "tokens.json", args.model, args.calib, SAMPLES, SEQ_LEN)
    for _ in range(args.rounds):
        taken["llmq"].append(
            measure.llmq("quantize", args.model, ours, "--method", "gptq", *OPTIONS, *calib, "--overwrite")
        )
        taken["GPTQModel"].append(measure.run(args.peer_python, peer, args.model, peers, *OPTIONS, "--tokens", tokens))
    print(measure.machine())
    for (name, runs), out in zip(taken.items(), (ours, peers), strict=True):
        figures = measure.scores(out, args.model, args.text, args.windows)
        seconds, peak = statistics.median(r.seconds for r in runs), max(r.peak_bytes for r in runs)
        print(
            f"{name:10s} {seconds:7.1f} s  peak {peak / 1e9:.2f} GB  perplexity {figures['perplexity']:.3f} (float "
            f"{figures['baseline_perplexity']:.3f})  mean KL {figures['kl_mean']:.5f}  top-1 {figures['top1']:.2%}"
        )
    medians = [statistics.median(r.seconds for r in runs) for runs in taken.values()]
    print(f"GPTQModel / llmq, whole processes: {medians[1] / medians[0]:.2f}")


if __name__ == "__main__":
    main()
