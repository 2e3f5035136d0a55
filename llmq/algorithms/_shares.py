"""Channels that share a scale: those of several heads where grouped-query attention reads one of the producer's.

Not here: folding the scales (model/folding.py).
"""

from torch import Tensor, nn

from llmq.steps import SiteView


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


def shared(per_input_K: Tensor, share: int, head_dim: int, *, largest: bool = False) -> Tensor:
    """Average (or take the largest of) a statistic over the heads that share a key-value head; shape `[K]` again."""
    if share == 1:
        return per_input_K
    heads = per_input_K.reshape(-1, share, head_dim)
    tied = heads.amax(1, keepdim=True) if largest else heads.mean(1, keepdim=True)
    return tied.expand_as(heads).reshape(-1)
