"""Unbalanced optimal transport between the tokens of two responses, batched over pairs.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, D hidden size.

For each pair the plan G solves (OTPO, arXiv 2505.18720, section 3)

    min_G  <G, C> + reg * KL(G | 1 1^T) + reg_m * (KL(G 1 | 1) + KL(G^T 1 | 1))

whose targets are vectors of ones, one unit of mass for each token, not probabilities. The solver works
on the dual potentials in the log domain, so that `reg` may go down to 0.01, and uses the
translation-invariant updates of Sejourne et al. 2022 (arXiv 2201.00730): the slow mode of unbalanced
Sinkhorn is the total mass, and one exact shift of the potentials before each half step removes it.

Padding is masked, never replaced by zero vectors: rows and columns outside the masks carry no mass.
Nothing here is differentiable; the weights are constants of the loss.

The work is done in float64 (float32 on devices without it): in float32 the residual of stiff problems
stalls near 1e-5, and nearly equal hidden states come out 1e-4 of their norm apart.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .sinkhorn import unbalanced_sinkhorn

CostScale = Literal["release", "pairwise"]





@dataclass(frozen=True)
class TransportWeights:
    """Token weights of a batch of pairs and how well their transport problems were solved.

    Attributes:
        chosen: `(B, M)`, non-negative, zero outside the mask, summing to `min(|y_c|, |y_r|)`.
        rejected: `(B, N)`, likewise, with the same sum.
        residual: As in [`Transport`], `(B,)`.
        iterations: As in [`Transport`].
    """

    chosen: Tensor
    rejected: Tensor
    residual: Tensor
    iterations: Tensor


@torch.no_grad()
def pairwise_cost(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    scale: CostScale = "release",
) -> Tensor:
    """Euclidean distances between hidden states, divided by their maximum where that exceeds 1.

    Args:
        chosen: Hidden states `(B, M, D)`, any floating dtype.
        rejected: Hidden states `(B, N, D)`.
        chosen_mask: `(B, M)` bool, true at real tokens.
        rejected_mask: `(B, N)` bool.
        scale: Over what the maximum is taken. `"release"`: over the distances and the norms of the states,
            which is what the official OTPO release computes, since it pads with zero vectors.
            `"pairwise"`: over the distances between real tokens alone, which keeps more contrast where the
            states share a large common part.

    Returns:
        `(B, M, N)` in float64 (float32 on devices without it), within [0, 1], zero outside the masks.
        Distances of float64 states are taken by differences, of narrower states by a float64 product,
        which is right to 1e-7 of their norm and a tenth of the time.

    Raises:
        ValueError: `scale` is unknown.
    """
    if scale not in ("release", "pairwise"):
        raise ValueError(f"cost scale must be 'release' or 'pairwise', got {scale!r}.")
    wide = torch.float32 if chosen.device.type == "mps" else torch.float64
    by_product = chosen.dtype != wide and wide == torch.float64
    mode = "use_mm_for_euclid_dist" if by_product else "donot_use_mm_for_euclid_dist"
    # A masked state may hold anything, NaN included; its entries of the cost are set to zero below.
    chosen = chosen.to(wide).masked_fill(~chosen_mask.unsqueeze(2), 0.0)
    rejected = rejected.to(wide).masked_fill(~rejected_mask.unsqueeze(2), 0.0)
    valid = chosen_mask.unsqueeze(2) & rejected_mask.unsqueeze(1)
    cost = torch.cdist(chosen, rejected, compute_mode=mode).masked_fill(~valid, 0.0)
    largest = cost.flatten(1).amax(1)
    if scale == "release":
        for states in (chosen, rejected):
            largest = torch.maximum(largest, states.norm(dim=2).amax(1))
        # The release adds this to every distance. Elsewhere it cancels: a constant cost scales the plan,
        # and the budget scales it back.
        largest = largest + 1e-6
    return cost / largest.clamp(min=1.0)[:, None, None]


@torch.no_grad()
def transport_weights(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    reg: float = 1.0,
    reg_m: float = 0.2,
    cost_scale: CostScale = "release",
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> TransportWeights:
    """OTPO's token weights: the plan's marginals, scaled to the budget `tau = min(|y_c|, |y_r|)`.

        w_c = G 1 * tau / |G|,   w_r = G^T 1 * tau / |G|   (arXiv 2505.18720, section 3)

    Only real tokens enter the problem: each pair's states are first gathered to the left, so prompts and
    padding cost nothing. That needs the longest completion's length, one wait for the device.

    Args:
        chosen: Hidden states that predict the chosen tokens, `(B, M, D)`, any floating dtype.
        rejected: Hidden states that predict the rejected tokens, `(B, N, D)`.
        chosen_mask: `(B, M)` bool, true at completion tokens; any pattern, empty rows too.
        rejected_mask: `(B, N)` bool.
        reg: Weight of the entropy term, > 0; the release's default is 1, small values give contrast.
        reg_m: Weight of the marginal terms, > 0; the release's default is 0.2.
        cost_scale: See [`pairwise_cost`].
        tolerance: See [`unbalanced_sinkhorn`].
        max_iterations: See [`unbalanced_sinkhorn`].

    Returns:
        Weights in float64 for float64 states and in float32 otherwise.
    """
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, chosen_index, chosen_valid = _gather_left(chosen, chosen_mask)
    rejected, rejected_index, rejected_valid = _gather_left(rejected, rejected_mask)
    cost = pairwise_cost(chosen, rejected, chosen_valid, rejected_valid, scale=cost_scale)
    solved = unbalanced_sinkhorn(
        cost,
        chosen_valid,
        rejected_valid,
        reg=reg,
        reg_m=reg_m,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    budget = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1)).to(cost.dtype)
    return TransportWeights(
        chosen=_scatter_back(solved.chosen_marginal, budget, chosen_index, chosen_mask).to(dtype),
        rejected=_scatter_back(solved.rejected_marginal, budget, rejected_index, rejected_mask).to(dtype),
        residual=solved.residual.to(dtype),
        iterations=solved.iterations,
    )


def _gather_left(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves each row's real tokens to the front: states `(B, W, D)`, their columns and mask `(B, W)`."""
    width = max(int(mask.sum(1).max()), 1)
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    left = states.gather(1, index.unsqueeze(2).expand(-1, -1, states.size(2)))
    return left, index, mask.gather(1, index)


def _scatter_back(marginal: Tensor, budget: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    total = marginal.sum(1)
    scaled = marginal * torch.where(total > 0, budget / total, 0.0).unsqueeze(1)
    return torch.zeros(mask.shape, dtype=marginal.dtype, device=marginal.device).scatter(1, index, scaled)
