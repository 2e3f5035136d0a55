"""Quantize a model with GPTQModel and report what that cost: a rival's figure, for llmq's own to be compared with.

Runs in an environment with `gptqmodel` (scripts/bench_peers.sh and scripts/interop.sh build one), not in llmq's own.
Calibration tokens are those of `_peer.calibration_rows`; every setting without an option here, and every option left
out, keeps GPTQModel's default (`act_group_aware`, damp 0.05). The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from typing import Any

import _peer

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it GPTQModel 7.7.0 does not start on a two-core machine


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = _peer.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=1, help="GPTQModel's default is 1")
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of the scale search, off (0) by default")
    parser.add_argument("--gptaq", type=float, metavar="ALPHA", help="asymmetric target, GPTQModel suggests 0.25")
    parser.add_argument("--foem", type=float, metavar="BETA", help="first-order term, GPTQModel suggests 0.2")
    parser.add_argument("--damp", type=float, help="damping, as a share of the Hessian's mean diagonal")
    parser.add_argument("--desc-act", action="store_true", help="activation order, in place of group-aware order")
    parser.add_argument("--static-groups", action="store_true", help="group scales from the weights before any update")
    parser.add_argument("--no-group-aware", action="store_true", help="neither order")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of GPTQModel's QuantizeConfig."""
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    chosen: dict[str, Any] = {
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": True,
        "desc_act": args.desc_act,
        "mse": args.mse,
        "static_groups": args.static_groups,
    }
    if args.no_group_aware:
        chosen["act_group_aware"] = False
    if args.damp is not None:
        chosen["damp_percent"] = args.damp
    if args.foem is not None:  # GPTQModel runs GPTAQ's term inside FOEM where both are asked for
        chosen["foem"] = FOEMConfig(alpha=args.gptaq or 0.0, beta=args.foem)
    elif args.gptaq is not None:
        chosen["gptaq"] = GPTAQConfig(alpha=args.gptaq)
    return chosen


def main() -> None:
    """Quantize, save, and print the report."""
    args, clock = parse_args(), _peer.Clock()
    from gptqmodel import GPTQModel, QuantizeConfig

    clock.done("import")
    config = QuantizeConfig(**settings(args))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in _peer.calibration_rows(args)]
    src, out = str(args.src.resolve()), str(args.out.resolve())
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # GPTQModel leaves logs/ behind
        model = GPTQModel.load(src, config, dtype=_peer.dtype_of(args))
        clock.done("load")
        model.quantize(rows, batch_size=args.batch_size)
        clock.done("quantize")
        model.save(out)
        clock.done("save")
    _peer.report(args, clock, ("gptqmodel",), config=repr(config))


if __name__ == "__main__":
    main()
