#!/usr/bin/env python
"""KL divergence and top-1 agreement of several quantized checkpoints with one float model, in one table.

python eval/kl.py FLOAT MODEL [MODEL ...] [--text FILE | --dataset wikitext2] [--convention gptq] [--windows 8]

Perplexity can fall while a model drifts from its original; KL divergence, KL(float || quantized) in nats per token,
cannot. The 99.9 percentile tells of rare, large failures that the mean hides.
"""

from __future__ import annotations

import sys

from perplexity import parser, report  # the script beside this one

from llmq import LlmqError


def main() -> None:
    """Parse the command line and report; bad input ends in one line and exit status 1."""
    options = parser("KL divergence and top-1 agreement with a float model.")
    options.add_argument("baseline", help="float checkpoint: a folder or a Hub id")
    options.add_argument("models", nargs="+", help="checkpoints to compare with it")
    args = options.parse_args()
    try:
        report(args, args.models, args.baseline)
    except LlmqError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
