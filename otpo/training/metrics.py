"""What the trainer logs about weights and rewards, as pure functions, and their averages over pairs.

Shapes: B pairs, T positions; rows are the chosen responses, then the rejected ones.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from otpo.transport.sinkhorn import wide_dtype


def weight_metrics(weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How concentrated the weights of each pair are, averaged over its responses that have tokens, `(B,)` each.

    Each number compares a response's weights with uniform ones, so long and short responses can be averaged:
    `weights/entropy` is the entropy of `w / sum(w)` over its largest value `log n`, in [0, 1] (1 for a response
    of one token); `weights/ess` is the effective share of tokens `(sum w)^2 / (n sum w^2)`, in (0, 1];
    `weights/max` is the largest weight over the mean one, at least 1. NaN for a pair without tokens or weight.

    Args:
        weights: `(2B, T)`, non-negative.
        mask: `(2B, T)` bool.
    """
    weights = weights.to(wide_dtype(weights.device)).masked_fill(~mask, 0.0)
    tiny = torch.finfo(weights.dtype).tiny
    count = mask.sum(1)
    total = weights.sum(1)
    share = weights / total.clamp(min=tiny).unsqueeze(1)
    entropy = torch.special.entr(share).sum(1)
    values = {
        "weights/entropy": torch.where(count > 1, entropy / count.clamp(min=2).log(), 1.0),
        "weights/ess": 1.0 / (share.square().sum(1) * count).clamp(min=tiny),
        "weights/max": share.amax(1) * count,
    }
    there = (count > 0) & (total > 0)
    return {
        name: torch.stack(value.masked_fill(~there, torch.nan).chunk(2)).nanmean(0) for name, value in values.items()
    }


def reward_metrics(rewards: Tensor, suffix: str = "") -> dict[str, Tensor]:
    """TRL's `rewards/*` of each pair, under names that end in `suffix`, `(B,)` each.

    Args:
        rewards: `(2B,)`, `beta * (log pi - log pi_ref)` of each response.
        suffix: Appended to each name.
    """
    chosen, rejected = rewards.chunk(2)
    return {
        f"rewards/chosen{suffix}": chosen,
        f"rewards/rejected{suffix}": rejected,
        f"rewards/accuracies{suffix}": (chosen > rejected).to(rewards.dtype),
        f"rewards/margins{suffix}": chosen - rejected,
    }


def pair_similarity(states: Tensor, mask: Tensor) -> Tensor:
    """How alike the hidden states of each pair's responses are: the length-normalised CHES score, `(B,)`.

        <h_c / |y_c|, h_r / |y_r|> - ||h_c / |y_c|||^2,   h the sum of a response's hidden states

    Source: arXiv 2410.08847, which takes the last hidden states, at the positions that predict the response's tokens.
    DPO on pairs whose score is high, near zero or above, lowers the likelihood of the chosen response, too: look at
    `logps/chosen`. The score is of the states that weights are made of, so with the option `hidden_layer` of that
    layer. It compares pairs of one model; its scale is that of the states, squared.

    Args:
        states: `(2B, T, D)`, whatever stands outside the mask. Sums are in float32, or in float64 for such states.
        mask: `(2B, T)` bool.

    Returns:
        NaN for a pair with an empty response.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    sums = states.masked_fill(~mask.unsqueeze(2), 0.0).sum(1, dtype=dtype)
    chosen, rejected = (sums / mask.sum(1, keepdim=True)).chunk(2)
    return (chosen * (rejected - chosen)).sum(1)


def averaged_over_pairs(metrics: Mapping[str, Sequence[float]], pairs: Sequence[int]) -> dict[str, list[float]]:
    """Batch means by name, each name's as one mean over pairs; lists of another length stay as they are.

    Batches of one size give the plain mean, to the last bit. Batches without any weight, whose `weights/*` are NaN,
    are left out of those.

    Args:
        metrics: For each name a number of each batch, as TRL collects them.
        pairs: Pairs of each batch, or its share in the mean.
    """
    averaged = {}
    for name, values in metrics.items():
        if len(values) != len(pairs):
            averaged[name] = list(values)
            continue
        known = list(zip(values, pairs, strict=True))
        if name.startswith("weights/"):
            known = [(value, count) for value, count in known if not math.isnan(value)] or known
        averaged[name] = [_mean(*zip(*known, strict=True))] if known else []
    return averaged


def _mean(values: Sequence[float], pairs: Sequence[int]) -> float:
    if len(set(pairs)) == 1:
        return sum(values) / len(values)
    return sum(value * count for value, count in zip(values, pairs, strict=True)) / sum(pairs)
