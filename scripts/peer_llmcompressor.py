"""Quantize a model with llm-compressor and report what that cost: a rival's figure, for llmq's own to be compared with.

Runs in an environment with `llmcompressor` (scripts/bench_peers.sh builds one), not in llmq's own. Calibration tokens
are those of `_peer.calibration_rows`, in order; every option left out keeps llm-compressor's default (GPTQ: activation
order with static groups, damp 0.01; AWQ: 20 points, duo scaling, then min-max rounding). The file is
`pack-quantized`, or what a `--scheme` of small floats stands for. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from typing import Any

import _peer


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = _peer.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=1, help="llm-compressor's default is 1")
    parser.add_argument("--method", choices=["gptq", "awq", "awq+gptq", "rtn"], default="gptq")
    parser.add_argument("--scheme", help="one of its schemes by name, as NVFP4A16, in place of --bits and --group-size")
    parser.add_argument("--observer", help="how a group's range is chosen: memoryless_minmax, memoryless_mse ...")
    parser.add_argument("--damp", type=float, help="GPTQ's damping, as a share of the Hessian's mean diagonal")
    parser.add_argument("--actorder", choices=["static", "group", "none"], help="GPTQ's order of columns")
    parser.add_argument("--duo-scaling", choices=["true", "false", "both"], help="whether AWQ looks at weights too")
    return parser.parse_args()


def recipe(args: argparse.Namespace) -> list[Any]:
    """Return the modifiers, in order."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    common: dict[str, Any] = {"config_groups": {"group_0": scheme(args)}, "ignore": ["lm_head"]}
    steps: list[Any] = []
    if "awq" in args.method:
        duo = {"true": True, "false": False, "both": "both"}
        steps.append(AWQModifier(**({"duo_scaling": duo[args.duo_scaling]} if args.duo_scaling else {})))
    if "gptq" in args.method:
        if args.damp is not None:
            common["dampening_frac"] = args.damp
        if args.actorder:
            common["actorder"] = None if args.actorder == "none" else args.actorder
        return [*steps, GPTQModifier(**common)]
    return [*steps, QuantizationModifier(**common)]


def scheme(args: argparse.Namespace) -> Any:
    """Return what every linear becomes."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    if args.scheme:
        made = preset_name_to_scheme(args.scheme, ["Linear"])
        if args.observer:
            made.weights.observer = args.observer
        return made
    weights: dict[str, Any] = {"num_bits": args.bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": args.group_size} | ({"observer": args.observer} if args.observer else {})
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def leave_memory_unpinned() -> None:
    """Let AWQ run where there is no accelerator: 0.14.0.1 pins memory for one, and stops where torch finds none.

    Pinning only speeds copies up; what is computed is the same. No setting turns it off.
    """
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None


def main() -> None:
    """Quantize, save, and print the report."""
    args, clock = parse_args(), _peer.Clock()
    leave_memory_unpinned()
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock.done("import")
    src, out = str(args.src.resolve()), str(args.out.resolve())
    model = AutoModelForCausalLM.from_pretrained(src, dtype=_peer.dtype_of(args))
    rows = _peer.calibration_rows(args)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    clock.done("load")
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(src),
            dataset=data,
            recipe=recipe(args),
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
            batch_size=args.batch_size,
            shuffle_calibration_samples=False,
        )
        clock.done("quantize")
        model.save_pretrained(out, save_compressed=True)
        AutoTokenizer.from_pretrained(src).save_pretrained(out)
        clock.done("save")
    _peer.report(args, clock, ("llmcompressor", "compressed-tensors"))


if __name__ == "__main__":
    main()
