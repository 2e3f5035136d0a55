"""What vLLM makes of llmq's files on a CPU: KL of its logits from llmq's reference, and a sentence of each.

    python scripts/interop_vllm.py make MODEL WORK --text FILE [--only NAME ...]     in llmq's Python: files, logits
    python scripts/interop_vllm.py check WORK [--only NAME ...]                      in vLLM's Python; prints a table

vLLM's Python is made by scripts/peers/env.sh (NAME vllm). Weight-only files need a CPU with AVX-512: vLLM has no
product for them on others. vLLM computes in bfloat16, llmq's reference in float32; how much that alone is, llmq run in
bfloat16 says. Status 0 only if each file is read or refused as CASES has it, with twice that KL at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import divergence

PROMPT = "The capital of France is"
TOKENS = 128
CALIBRATED = "--calib TEXT --samples 4 --seq-len 256"
BITS8 = "--bits 8 --group-size channel --act-bits 8 --format compressed-tensors"
NEVER = "no product for it on CPUs"


@dataclass(frozen=True)
class Case:
    """One file. options: of `llmq quantize`. more: KL that is excused. refused: why vLLM does not run it."""

    options: str
    more: float = 0.002
    refused: str = ""


CASES = {
    "w4a16": Case("--group-size 64 --format compressed-tensors"),
    "w4a16 asym": Case("--group-size 64 --asym --format compressed-tensors"),
    "w4a16 head": Case("--group-size 64 --lm-head --format compressed-tensors"),
    "gptq": Case("--group-size 64 --format gptq"),
    "gptq channel": Case("--group-size channel --format gptq"),
    "awq": Case("--group-size 64 --asym --format awq"),
    "awq sym": Case("--group-size 64 --format awq"),
    "w8a8": Case(BITS8),
    "w8a8 act-asym": Case(f"{BITS8} --act-asym"),
    "w8a8 static": Case(f"{BITS8} --act tensor {CALIBRATED}"),
    "fp8": Case("--scheme fp8"),
    "fp8 static": Case(f"--scheme fp8-static {CALIBRATED}", refused=NEVER),
    "kv fp8": Case(f"--group-size 64 --format compressed-tensors --kv-bits 8 {CALIBRATED}", more=0.05),  # keys in fp8
    "nvfp4a16": Case("--scheme nvfp4a16", refused=NEVER),
    "mxfp4": Case("--scheme mxfp4", refused=NEVER),
    "w8a16": Case("--bits 8 --group-size channel --format compressed-tensors", refused=NEVER),
    "w3a16": Case("--bits 3 --group-size 64 --format compressed-tensors", refused=NEVER),
}


def make(model: Path, work: Path, text: Path, names: list[str]) -> None:
    """Write the files, llmq's logits for the first tokens of a text, and whether llmq says that vLLM takes each."""
    import llmq
    from llmq.checkpoint.shards import write

    work.mkdir(parents=True, exist_ok=True)
    ids = torch.tensor(llmq.load_tokenizer(model)(text.read_text()[:4000])["input_ids"][:TOKENS])[None]
    for name in names:
        out = work / name.replace(" ", "-")
        options = [str(text) if word == "TEXT" else word for word in CASES[name].options.split()]
        command = [sys.executable, "-m", "llmq", "quantize", str(model), str(out), "--method", "rtn", *options]
        subprocess.run([*command, "--overwrite"], check=True)  # noqa: S603, llmq itself
        with torch.no_grad():
            logits, rounded = (
                llmq.load(out, dtype=dtype, backend="reference")(ids).logits[0, :-1].float().contiguous()
                for dtype in (torch.float32, torch.bfloat16)
            )
        write(out.with_suffix(".safetensors"), {"ids": ids[0], "logits": logits, "bfloat16": rounded})


def check(work: Path, names: list[str]) -> bool:
    """Run each file that is there in a process of its own; print a line for each."""
    fine = True
    print(f"| file | KL | of bfloat16 alone | same token | {PROMPT!r} |\n|---|---|---|---|---|")
    for name in names:
        folder = work / name.replace(" ", "-")
        if folder.is_dir():
            command = [sys.executable, __file__, "one", str(folder)]
            ran = subprocess.run(command, capture_output=True, text=True, env=_settings(), check=False)  # noqa: S603
            fine &= _told(name, ran)
    return fine


def _settings() -> dict[str, str]:
    """Return the environment of a run in one process, whose logits can be caught."""
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | {
        "VLLM_CPU_KVCACHE_SPACE": "1"
    }


def _told(name: str, ran: subprocess.CompletedProcess[str]) -> bool:
    """Print what came of a file; return whether it is what CASES says."""
    case = CASES[name]
    if ran.returncode:
        why = [s for s in ran.stderr.splitlines() if "Error: " in s] or [ran.stderr[-300:]]
        print(f"| {name} | refused: {why[-1]} | | | |", flush=True)
        return bool(case.refused)
    found = json.loads(ran.stdout.splitlines()[-1])
    figures = f"{found['kl']:.5f} | {found['bfloat16']:.5f} | {found['same']:.1%} | {found['said']!r}"
    print(f"| {name} | {figures} |", flush=True)
    return not case.refused and bool(found["kl"] < 2 * found["bfloat16"] + case.more)


def one(folder: Path) -> None:
    """Load a file, catch the logits of a prompt, and print what they differ by."""
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    wanted = load_file(folder.with_suffix(".safetensors"))
    llm = LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=TOKENS + 32)
    said = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    caught: list[torch.Tensor] = []
    llm.apply_model(lambda model: _catch(model, caught))
    once = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    llm.generate([{"prompt_token_ids": wanted["ids"].tolist()}], once)
    (logits,) = (c for c in caught if len(c) == TOKENS - 1)
    same = (wanted["logits"].argmax(-1) == logits.argmax(-1)).double().mean()
    kl = {"kl": divergence(logits, wanted["logits"]), "bfloat16": divergence(wanted["bfloat16"], wanted["logits"])}
    print(json.dumps({**kl, "same": float(same), "said": said}))


def _catch(model: Any, caught: list[torch.Tensor]) -> None:
    """Keep what a model returns as logits."""
    compute = model.compute_logits

    def kept(*args: Any, **more: Any) -> torch.Tensor:
        caught.append(logits := compute(*args, **more))
        return logits

    model.compute_logits = kept


def main() -> None:
    """Make, check, or run one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "check", "one"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), metavar="NAME")
    args = parser.parse_args()
    if args.what == "make":
        make(*args.paths, args.text, args.only)
    elif args.what == "check":
        sys.exit(not check(*args.paths, args.only))
    else:
        one(*args.paths)


if __name__ == "__main__":
    main()
