"""Costs between the tokens of two responses, from their hidden states.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, W of either, D hidden size.
"""

import torch
from torch import Tensor

from otpo.registry import one_of

from .registry import COST_SCALES, COSTS, Cost, CostScale
from .sinkhorn import wide_dtype


@torch.no_grad()
def pairwise_cost(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    cost: Cost = "euclidean",
    scale: CostScale = "release",
) -> Tensor:
    """Costs between hidden states, divided by their maximum where that exceeds 1.

    Args:
        chosen: Hidden states `(B, M, D)`, any floating dtype.
        rejected: Hidden states `(B, N, D)`.
        chosen_mask: `(B, M)` bool, true at real tokens.
        rejected_mask: `(B, N)` bool.
        cost: As in [`TransportOptions`].
        scale: Over what the maximum is taken, as `cost_scale` in [`TransportOptions`].

    Returns:
        `(B, M, N)` in float64 (float32 on devices without it), within [0, 1], zero outside the masks.
        Distances of float64 states are taken by differences, of narrower states by a float64 product,
        which is right to 1e-7 of their norm and a tenth of the time.

    Raises:
        ValueError: `cost` or `scale` is unknown.
    """
    one_of(COSTS)("cost", cost)
    one_of(COST_SCALES)("cost_scale", scale)
    kind = COSTS[cost]
    wide = wide_dtype(chosen.device)
    by_product = chosen.dtype != wide and wide == torch.float64
    # A masked state may hold anything, NaN included; its entries of the cost are set to zero below.
    chosen = chosen.to(wide).masked_fill(~chosen_mask.unsqueeze(2), 0.0)
    rejected = rejected.to(wide).masked_fill(~rejected_mask.unsqueeze(2), 0.0)
    valid = chosen_mask.unsqueeze(2) & rejected_mask.unsqueeze(1)
    costs = kind.load()(chosen, rejected, by_product=by_product).masked_fill(~valid, 0.0)
    largest = costs.flatten(1).amax(1)
    from_zero = kind.load_from_zero()
    if scale == "release" and from_zero is not None:
        for states in (chosen, rejected):
            largest = torch.maximum(largest, from_zero(states).amax(1))
        # The release adds this to every distance. Elsewhere it cancels: a constant cost scales the plan,
        # and the budget scales it back.
        largest = largest + 1e-6
    return costs / largest.clamp(min=1.0)[:, None, None]


def euclidean(chosen: Tensor, rejected: Tensor, *, by_product: bool) -> Tensor:
    """Euclidean distances `(B, M, N)` of states `(B, M, D)` and `(B, N, D)`.

    Args:
        chosen: Zero outside the mask, and so is `rejected`.
        rejected: Of the same dtype.
        by_product: Take them by a matrix product, not by differences.
    """
    mode = "use_mm_for_euclid_dist" if by_product else "donot_use_mm_for_euclid_dist"
    return torch.cdist(chosen, rejected, compute_mode=mode)


def norms(states: Tensor) -> Tensor:
    """Euclidean distances `(B, W)` of states `(B, W, D)` from zero."""
    return states.norm(dim=2)


def cosine(chosen: Tensor, rejected: Tensor, *, by_product: bool) -> Tensor:
    """One less the cosines `(B, M, N)` of states `(B, M, D)` and `(B, N, D)`, 1 where a state is zero.

    Args:
        chosen: Zero outside the mask, and so is `rejected`.
        rejected: Of the same dtype.
        by_product: Cosines are products either way.
    """
    return (1.0 - _directions(chosen) @ _directions(rejected).mT).clamp(min=0.0)


def _directions(states: Tensor) -> Tensor:
    """States over their norms, however small; zeros stay zeros."""
    norms = states.norm(dim=2, keepdim=True)
    return states / norms.masked_fill(norms == 0, 1.0)
