"""Quantize a model with AutoRound and report what that cost: a rival's figure, for llmq's own to be compared with.

Runs in an environment with `auto-round` (scripts/bench_peers.sh builds one), not in llmq's own. Calibration tokens are
those of `_peer.calibration_rows`; every option left out keeps AutoRound's default. Its recipe `light` is `--iters 50
--lr 5e-3`, its default 200 iterations with a rate of 1/200; without `--lr` the rate is one over the iterations.

AutoRound drops the last token of every row from its loss when it is given token ids; all are in its forwards.
The file is `auto_gptq`: float16 scales, which may be negative, and no zero but the middle. With a `--scheme` of small
floats it is the float weights that the codes stand for (`fake`), inputs left as they are. The last line printed is one
JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import _peer


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = _peer.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step, AutoRound's default is 8")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's default is 200")
    parser.add_argument("--lr", type=float, help="learning rate of rounding and ranges")
    parser.add_argument("--alg-ext", action="store_true", help="its extension, meant for 2 bits and experimental")
    parser.add_argument("--seed", type=int, default=42, help="AutoRound's default is 42")
    parser.add_argument("--scheme", help="small floats, as NVFP4, in place of --bits and --group-size")
    parser.add_argument("--format", default="auto_gptq", choices=["auto_gptq", "auto_awq", "fake"])
    return parser.parse_args()


def call_float(file: Path) -> None:
    """Say in config.json what the weights are: AutoRound describes the codes there that it has not written."""
    config = json.loads(file.read_text())
    config.pop("quantization_config", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Quantize, save, and print the report."""
    args, clock = parse_args(), _peer.Clock()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock.done("import")
    src, out = str(args.src.resolve()), str(args.out.resolve())
    model = AutoModelForCausalLM.from_pretrained(src, dtype=_peer.dtype_of(args))
    tokenizer = AutoTokenizer.from_pretrained(src)
    rows = [torch.tensor([row]) for row in _peer.calibration_rows(args)]
    clock.done("load")
    settings: dict[str, object] = {"amp": False} if args.dtype == "float32" else {}
    if args.lr is not None:
        settings["lr"] = args.lr
    if args.scheme:
        from auto_round.schemes import PRESET_SCHEMES

        preset = PRESET_SCHEMES[args.scheme]
        settings["scheme"] = {k: getattr(preset, k) for k in ("bits", "group_size", "data_type")} | {"act_bits": 16}
    else:
        settings |= {"scheme": f"W{args.bits}A16", "bits": args.bits, "group_size": args.group_size, "sym": True}
    if args.alg_ext:
        settings["enable_alg_ext"] = True
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # AutoRound leaves ar_work_space/ behind
        rounder = AutoRound(
            model,
            tokenizer,
            iters=args.iters,
            batch_size=args.batch_size,
            dataset=rows,
            nsamples=len(rows),
            seqlen=rows[0].shape[1],
            seed=args.seed,
            device_map="cpu",
            **settings,
        )
        _, folder = rounder.quantize_and_save("export", format=args.format)  # it chooses a folder below
        clock.done("quantize")
        shutil.move(folder, out)
        if args.format == "fake":
            call_float(Path(out, "config.json"))
        clock.done("save")
    _peer.report(args, clock, ("auto-round",), compiled=rounder.enable_torch_compile, amp_dtype=str(rounder.amp_dtype))


if __name__ == "__main__":
    main()
