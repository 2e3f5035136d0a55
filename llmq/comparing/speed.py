"""How fast a checkpoint writes here: tokens a second of one sequence, behind the first.

A folder is run by transformers with llmq's linears, a GGUF file by llama.cpp: each as `llmq chat` runs it.
Not here: other machines (pipeline/machines.py), benchmarks of kernels (scripts/).
"""

from importlib.util import find_spec

from llmq.checkpoint.place import is_gguf
from llmq.talk.speaker import Sampling, opened

PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman who"
WRITTEN = 24


def measured(out: str) -> bool:
    """Say whether what runs a checkpoint is installed."""
    return not is_gguf(out) or find_spec("xllamacpp") is not None


def tokens_per_second(out: str, device: str = "auto") -> float | None:
    """Return how fast a checkpoint writes, greedily; None where it ends its text with the first token.

    Raises LlmqError as `talk.opened` does.
    """
    with opened(out, device, 256) as speaker:
        ids = speaker.encode(PROMPT)
        rates = []
        for written in (4, WRITTEN):  # once for what is compiled at first use
            answer = speaker.answer(ids, Sampling(written, temperature=0))
            for _ in answer:
                pass
            rates.append(answer.rate)
    return rates[-1] or None
