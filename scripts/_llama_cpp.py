"""A GGUF file running in llama.cpp, through the server of the xllamacpp wheel."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A loaded file; one sequence at a time, on one thread, greedy."""

    def __init__(self, path: Path, context: int = 128) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)
        self._ask("/lora-adapters")  # waits for its queue: a server that ends before that runs never ends

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text; `special` adds BOS where the file says so."""
        return list(self._ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"])

    def generate(self, ids: list[int], n: int) -> list[int]:
        """Return the next `n` ids, whatever they are."""
        answer = self._ask("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True, ignore_eos=True)
        return list(answer["tokens"])

    def log_probabilities(self, ids: list[int], vocab: int) -> dict[int, float]:
        """Return the log-probability of every next id."""
        letter = self.tokenize("a", special=False)[-1]  # generated whatever they are: half a character gives no answer
        how = {"n_predict": 1, "temperature": 0, "n_probs": vocab, "logit_bias": [[letter, 1e4]]}
        answer = self._ask("/completion", prompt=ids, **how)
        return {p["id"]: p["logprob"] for p in answer["completion_probabilities"][0]["top_logprobs"]}

    def chat(self, content: str) -> str:
        """Return what the file's chat template makes of one message of a user."""
        return str(self._ask("/apply-template", messages=[{"role": "user", "content": content}])["prompt"])

    def _ask(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        url = self._server.listening_address + path
        posted = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, posted, headers)  # noqa: S310, a server of our own
        with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
            return json.load(answer)
