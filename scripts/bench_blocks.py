"""The first blocks of a model quantized, the rest of it left float: what methods do to it, at a fraction of the cost.

    python scripts/bench_blocks.py cut MODEL N OUT                  a checkpoint of the first N blocks
    python scripts/bench_blocks.py score MODEL FOLDER ... --text FILE [--windows 2] [--blocks N] [--out FILE]

Whatever quantizes block by block, in order, makes of the first blocks of a model what it makes of these blocks alone:
llmq without a head and without Fisher weights, llm-compressor, AutoRound. `score` puts the blocks of each folder (the
first N of them) in place of MODEL's own and measures the whole against MODEL in float32. Several folders share the
float model's states. Figures compare with those of as many blocks of the same model, and with nothing else. Where few
blocks are quantized a few tokens hold much of the divergence: beside its mean stands that of all tokens but the worst
hundredth.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint import Source
from llmq.evaluation import scores
from llmq.evaluation.windows import find_convention, load_text
from llmq.loading import load, load_tokenizer


class Watched(scores.Predictor):
    """A model whose last log-probabilities are kept."""

    def log_probs(self, states: Tensor) -> Tensor:
        """See `Predictor.log_probs`."""
        self.last = super().log_probs(states)
        return self.last


class Truth(scores.Predictor):
    """The float model: its states of windows are computed once, for all models that are compared with it.

    scored: the model beside it, which is asked for a window's log-probabilities first. kl: of its tokens, in nats.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "the float model")
        self.kept: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.scored: Watched

    def each(self, windows: Sequence[list[int]]) -> Iterator[Tensor]:
        """Yield the states of each window; they are always the same windows."""
        for i, ids in enumerate(windows):
            if i == len(self.kept):
                self.kept.append(self.states(ids))
            yield self.kept[i]

    def log_probs(self, states: Tensor) -> Tensor:
        """See `Predictor.log_probs`."""
        log_p = super().log_probs(states)
        self.kl.append((log_p.exp() * (log_p - self.scored.last)).sum(-1))
        return log_p

    def spread(self) -> dict[str, float]:
        """Return the median divergence of the tokens scored, and the mean without the worst hundredth of them."""
        kl = torch.cat(self.kl).sort().values
        return {"kl_median": float(kl[len(kl) // 2]), "kl_trimmed": float(kl[: len(kl) * 99 // 100].mean())}


def cut(model: Path, blocks: int, out: Path) -> None:
    """Write a checkpoint of the first blocks of a model, embeddings, norm and head as they are."""
    source = Source(model)
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, out / file.name)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:blocks]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kept = [n for n in source.names() if ".layers." not in n or int(n.split(".layers.")[1].split(".")[0]) < blocks]
    save_file({n: source.get(n) for n in kept}, out / "model.safetensors", metadata={"format": "pt"})


def score(args: argparse.Namespace) -> None:
    """Print what the blocks of each folder do to the model, and add it to the rows of a file."""
    how = find_convention(args.convention)
    text, tokenizer = load_text(args.text, None, how), load_tokenizer(str(args.model))
    model: Any = load(args.model, device="cpu", dtype=torch.float32)
    truth, rows = Truth(load(args.model, device="cpu", dtype=torch.float32).eval()), {}
    own = list(model.model.layers)
    for folder in args.folders:
        part: Any = load(folder, device="cpu", dtype=torch.float32)
        count = min(args.blocks or len(own), len(part.model.layers))
        for i in range(len(own)):
            model.model.layers[i] = part.model.layers[i] if i < count else own[i]
        truth.scored, truth.kl = Watched(model.eval(), folder.name), []
        e = scores.measure(truth.scored, truth, tokenizer, text, how, args.windows)
        rows[folder.name] = {"blocks": count, **e.to_json(), **truth.spread()}
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    if args.out:
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(before | rows, indent=2) + "\n")


def main() -> None:
    """Cut a model, or score what was made of its blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    cutting = actions.add_parser("cut")
    cutting.add_argument("model", type=Path)
    cutting.add_argument("blocks", type=int)
    cutting.add_argument("out", type=Path)
    cutting.set_defaults(run=lambda args: cut(args.model, args.blocks, args.out))
    scoring = actions.add_parser("score")
    scoring.add_argument("model", type=Path)
    scoring.add_argument("folders", type=Path, nargs="+")
    scoring.add_argument("--text", required=True, type=Path)
    scoring.add_argument("--windows", type=int, default=2)
    scoring.add_argument("--blocks", type=int, help="the first so many of a folder; all of them")
    scoring.add_argument("--convention", default="gptq", help="llama.cpp for models that need BOS before every window")
    scoring.add_argument("--out", type=Path, help="JSON file for the figures")
    scoring.set_defaults(run=score)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
