"""What the trainer logs about weights and rewards, as pure functions.

Shapes: B pairs, T positions; rows are the chosen responses, then the rejected ones.
"""

import torch
from torch import Tensor

from .sinkhorn import wide_dtype


def weight_metrics(weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How concentrated the weights are, averaged over responses that have tokens.

    Each number compares a response's weights with uniform ones, so long and short responses can be averaged:
    `weights/entropy` is the entropy of `w / sum(w)` over its largest value `log n`, in [0, 1] (1 for a response
    of one token); `weights/ess` is the effective share of tokens `(sum w)^2 / (n sum w^2)`, in (0, 1];
    `weights/max` is the largest weight over the mean one, at least 1.

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
    normalised = torch.where(count > 1, entropy / count.clamp(min=2).log(), 1.0)
    ess = 1.0 / (share.square().sum(1) * count).clamp(min=tiny)
    largest = share.amax(1) * count
    rows = (count > 0) & (total > 0)
    return {
        "weights/entropy": _mean(normalised, rows),
        "weights/ess": _mean(ess, rows),
        "weights/max": _mean(largest, rows),
    }


def reward_metrics(rewards: Tensor, suffix: str) -> dict[str, Tensor]:
    """TRL's `rewards/*` for other rewards, under names that end in `suffix`.

    Args:
        rewards: `(2B,)`, `beta * (log pi - log pi_ref)` of each response.
        suffix: Appended to each name.
    """
    chosen, rejected = rewards.to(wide_dtype(rewards.device)).chunk(2)
    return {
        f"rewards/chosen{suffix}": chosen.mean(),
        f"rewards/rejected{suffix}": rejected.mean(),
        f"rewards/margins{suffix}": (chosen - rejected).mean(),
        f"rewards/accuracies{suffix}": (chosen > rejected).to(chosen.dtype).mean(),
    }


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    return values.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)
