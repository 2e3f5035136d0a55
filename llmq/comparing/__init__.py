"""Ways to quantize one model, side by side: what each costs, which are worth taking (`llmq compare`)."""

from llmq.comparing._run import compare as compare
