"""Folding a per-channel scale into the linears of a site and, inverted, into what produces their input.

`x -> x / s` and `W[:, j] -> W[:, j] * s_j` leave `W x` unchanged. A norm absorbs 1/s in its gain, a linear in its rows
(and bias). Where the producer is the value projection of grouped-query attention, each of its rows feeds the same
channel of several heads, so these channels share one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.types import SiteView


def shares(view: SiteView) -> int | None:
    """Return how many input channels read each channel of the producer (1, or the heads per key-value head).

    None where the site has no producer that can absorb a scale.
    """
    if view.site.producer is None:
        return None
    producer = view.modules[view.site.producer]
    channels = producer.weight.shape[0]
    K = view.modules[view.site.linears[0]].weight.shape[1]
    if channels == K:
        return 1
    return K // channels if isinstance(producer, nn.Linear) and K % channels == 0 else None


def tie(per_input_K: Tensor, share: int, head_dim: int, *, largest: bool = False) -> Tensor:
    """Average (or take the largest of) a statistic over the heads that share a key-value head; shape `[K]` again."""
    if share == 1:
        return per_input_K
    heads = per_input_K.reshape(-1, share, head_dim)
    tied = heads.amax(1, keepdim=True) if largest else heads.mean(1, keepdim=True)
    return tied.expand_as(heads).reshape(-1)


def fold(view: SiteView, scale_K: Tensor, share: int, head_dim: int) -> None:
    """Multiply the site's columns by `scale_K` and divide its producer by it, in place.

    A norm's gain is rounded to the dtype it is stored in first and the columns take the ratio that results, so that
    the rounding cancels. Channels whose gain is or becomes 0 keep scale 1.
    """
    producer = view.modules[view.site.producer or ""]
    if isinstance(producer, nn.Linear):
        rows = scale_K if share == 1 else scale_K.reshape(-1, share, head_dim)[:, 0].reshape(-1)
        producer.weight.div_(rows[:, None])
        if producer.bias is not None:
            producer.bias.div_(rows)
    else:
        gain = producer.weight
        stored = (gain / scale_K).to(view.stored_dtype).to(gain.dtype)
        keep = (stored == 0) | ~torch.isfinite(stored)
        stored = torch.where(keep, gain, stored)
        scale_K = torch.where(keep, torch.ones_like(scale_K), gain / stored)
        gain.copy_(stored)
    for name in view.site.linears:
        view.modules[name].weight.mul_(scale_K)
