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

CostScale = Literal["release", "pairwise"]

# Iterations between two looks at the residual on an accelerator: each look waits for the device.
_CHECK_EVERY = 10


@dataclass(frozen=True)
class Transport:
    """A solved batch of transport problems.

    Attributes:
        chosen_marginal: Mass that leaves each chosen token, `G 1` `(B, M)`; zero outside the mask.
        rejected_marginal: Mass that reaches each rejected token, `G^T 1` `(B, N)`; zero outside the mask.
        chosen_potential: Dual potential over `reg`, `(B, M)`; `-inf` outside the mask.
        rejected_potential: Dual potential over `reg`, `(B, N)`; `-inf` outside the mask.
        residual: Largest relative violation of the optimality condition of a marginal, `(B,)`.
        iterations: Full sweeps that were run, the same for every pair of the batch.
    """

    chosen_marginal: Tensor
    rejected_marginal: Tensor
    chosen_potential: Tensor
    rejected_potential: Tensor
    residual: Tensor
    iterations: int

    def plan(self, cost: Tensor, reg: float) -> Tensor:
        """The transport plan `G`, `(B, M, N)`, for the `cost` and `reg` that were solved."""
        return (self.chosen_potential.unsqueeze(2) + self.rejected_potential.unsqueeze(1) - cost / reg).exp()


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
    iterations: int


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
def unbalanced_sinkhorn(
    cost: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    reg: float,
    reg_m: float,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Transport:
    """Solves the unbalanced transport problem of every pair at once.

    One sweep, with `a = f / reg`, `b = g / reg` and `phi = reg_m / (reg_m + reg)`:

        a_i = -phi * logsumexp_j(b_j - C_ij / reg),   b_j = -phi * logsumexp_i(a_i - C_ij / reg),

    and before each half step the exact shift `a + s, b - s` that maximises the dual over translations
    (arXiv 2201.00730, section 4). On an accelerator the residual is looked at every tenth sweep, so the loop
    waits for the device that often and no oftener.

    Args:
        cost: `(B, M, N)`, non-negative, finite, float64 or float32; the dtype of the work and the result.
        chosen_mask: `(B, M)` bool.
        rejected_mask: `(B, N)` bool. A pair with an empty side gets no mass and residual zero.
        reg: Weight of the entropy term, > 0; down to 0.01 for costs in [0, 1].
        reg_m: Weight of the two marginal terms, > 0.
        tolerance: Stop when every pair's residual is at most this.
        max_iterations: Sweeps at most; the residual says what was reached.

    Raises:
        ValueError: `reg` or `reg_m` is not a positive finite number.
    """
    for name, value in (("reg", reg), ("reg_m", reg_m)):
        if not 0.0 < value < float("inf"):
            raise ValueError(f"`{name}` must be a positive finite number, got {value}.")
    phi = reg_m / (reg_m + reg)
    ratio = reg / reg_m
    kernel = cost / -reg
    rows = chosen_mask & rejected_mask.any(1, keepdim=True)
    columns = rejected_mask & chosen_mask.any(1, keepdim=True)
    a = torch.zeros_like(kernel[:, :, 0]).masked_fill(~rows, -torch.inf)
    b = torch.zeros_like(kernel[:, 0, :]).masked_fill(~columns, -torch.inf)

    check_every = 1 if cost.device.type == "cpu" else _CHECK_EVERY
    residual = torch.full_like(kernel[:, 0, 0], torch.inf)
    iteration = 0
    while iteration < max_iterations:
        iteration += 1
        shift = _mass_shift(a, b, rows, columns, ratio)
        b = b - shift
        updated = -phi * _lse_rows(kernel, b, rows)
        residual = ((updated - a - shift) / phi).masked_fill(~rows, 0.0).abs().amax(1)
        a = updated.masked_fill(~rows, -torch.inf)
        a = a + _mass_shift(a, b, rows, columns, ratio)
        b = (-phi * _lse_columns(kernel, a, columns)).masked_fill(~columns, -torch.inf)
        if iteration % check_every == 0 and bool((residual <= tolerance).all()):
            break
    return Transport(
        chosen_marginal=(a + _lse_rows(kernel, b, rows)).exp(),
        rejected_marginal=(b + _lse_columns(kernel, a, columns)).exp(),
        chosen_potential=a,
        rejected_potential=b,
        residual=residual,
        iterations=iteration,
    )


def _lse_rows(kernel: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    return torch.logsumexp(kernel + b.unsqueeze(1), 2).masked_fill(~rows, 0.0)


def _lse_columns(kernel: Tensor, a: Tensor, columns: Tensor) -> Tensor:
    return torch.logsumexp(kernel + a.unsqueeze(2), 1).masked_fill(~columns, 0.0)


def _mass_shift(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, ratio: float) -> Tensor:
    """The translation of `a` (and of `b`, negated) that is optimal for the dual, `(B, 1)`."""
    mass_a = torch.logsumexp((a * -ratio).masked_fill(~rows, -torch.inf), 1, keepdim=True)
    mass_b = torch.logsumexp((b * -ratio).masked_fill(~columns, -torch.inf), 1, keepdim=True)
    return torch.where(rows.any(1, keepdim=True), (mass_a - mass_b) / (2.0 * ratio), 0.0)


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
