"""OTPO's token weights: the marginals of unbalanced optimal transport between two responses' hidden states.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, D hidden size.

`transport_weights` is the whole way from hidden states to weights. It runs in the Triton kernels of
`otpo_kernels.sinkhorn` or, as their reference, here and in `otpo.sinkhorn`, in plain torch. The torch way
works in float64 (float32 on devices without it): in float32 the residual of stiff problems stalls near
1e-5, and nearly equal hidden states come out 1e-4 of their norm apart.

Padding is masked, never replaced by zero vectors: rows and columns outside the masks carry no mass.
Nothing here is differentiable; the weights are constants of the loss.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .sinkhorn import check_positive, unbalanced_sinkhorn
from .solver_choice import Solver, choose_solver

Cost = Literal["euclidean", "cosine"]
CostScale = Literal["release", "pairwise"]

# Matrices of float64 that the torch way holds of every pair at its peak: the cost, the kernel and two sums.
_MATRICES = 4


@dataclass(frozen=True)
class TransportWeights:
    """Token weights of a batch of pairs and how well their transport problems were solved.

    Attributes:
        chosen: `(B, M)`, non-negative, zero outside the mask, summing to `min(|y_c|, |y_r|)`.
        rejected: `(B, N)`, likewise, with the same sum.
        residual: As in [`Transport`], `(B,)`.
        iterations: As in [`Transport`].
        solver: What has run, `"triton"` or `"torch"`.
    """

    chosen: Tensor
    rejected: Tensor
    residual: Tensor
    iterations: Tensor
    solver: Literal["triton", "torch"]


def check_cost_scale(scale: str, name: str = "cost_scale") -> None:
    """Raises a `ValueError` that names the option unless `scale` is one of `CostScale`."""
    if scale not in get_args(CostScale):
        raise ValueError(f"`{name}` must be 'release' or 'pairwise', got {scale!r}.")


def check_cost(cost: str, name: str = "cost") -> None:
    """Raises a `ValueError` that names the option unless `cost` is one of `Cost`."""
    if cost not in get_args(Cost):
        raise ValueError(f"`{name}` must be 'euclidean' or 'cosine', got {cost!r}.")


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
    """Distances between hidden states, divided by their maximum where that exceeds 1.

    Args:
        chosen: Hidden states `(B, M, D)`, any floating dtype.
        rejected: Hidden states `(B, N, D)`.
        chosen_mask: `(B, M)` bool, true at real tokens.
        rejected_mask: `(B, N)` bool.
        cost: `"euclidean"`, or `"cosine"`: `1 - <h, g> / (|h| |g|)`, within [0, 2] before the division, and 1 where
            a state is zero. The paper's ablation weighs tokens by cosine similarity; this cost is our choice.
        scale: Over what the maximum is taken. `"release"`: over the distances and the norms of the states,
            which is what the official OTPO release computes, since it pads with zero vectors.
            `"pairwise"`: over the distances between real tokens alone, which keeps more contrast where the
            states share a large common part. Both are the same for cosines: zero vectors cost 1 there, and the
            maximum is at least 1 anyway.

    Returns:
        `(B, M, N)` in float64 (float32 on devices without it), within [0, 1], zero outside the masks.
        Distances of float64 states are taken by differences, of narrower states by a float64 product,
        which is right to 1e-7 of their norm and a tenth of the time.

    Raises:
        ValueError: `cost` or `scale` is unknown.
    """
    check_cost(cost)
    check_cost_scale(scale)
    wide = torch.float32 if chosen.device.type == "mps" else torch.float64
    by_product = chosen.dtype != wide and wide == torch.float64
    mode = "use_mm_for_euclid_dist" if by_product else "donot_use_mm_for_euclid_dist"
    # A masked state may hold anything, NaN included; its entries of the cost are set to zero below.
    chosen = chosen.to(wide).masked_fill(~chosen_mask.unsqueeze(2), 0.0)
    rejected = rejected.to(wide).masked_fill(~rejected_mask.unsqueeze(2), 0.0)
    valid = chosen_mask.unsqueeze(2) & rejected_mask.unsqueeze(1)
    if cost == "cosine":
        distances = (1.0 - _directions(chosen) @ _directions(rejected).mT).clamp(min=0.0)
    else:
        distances = torch.cdist(chosen, rejected, compute_mode=mode)
    distances = distances.masked_fill(~valid, 0.0)
    largest = distances.flatten(1).amax(1)
    if scale == "release" and cost == "euclidean":
        for states in (chosen, rejected):
            largest = torch.maximum(largest, states.norm(dim=2).amax(1))
        # The release adds this to every distance. Elsewhere it cancels: a constant cost scales the plan,
        # and the budget scales it back.
        largest = largest + 1e-6
    return distances / largest.clamp(min=1.0)[:, None, None]


@torch.no_grad()
def transport_weights(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    reg: float = 1.0,
    reg_m: float = 0.2,
    cost: Cost = "euclidean",
    cost_scale: CostScale = "release",
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    solver: Solver = "auto",
    memory_budget: int | None = None,
) -> TransportWeights:
    """OTPO's token weights: the plan's marginals, scaled to the budget `tau = min(|y_c|, |y_r|)`.

        w_c = G 1 * tau / |G|,   w_r = G^T 1 * tau / |G|   (arXiv 2505.18720, section 3)

    Only real tokens enter the problem, so prompts and padding cost nothing. The two solvers agree to 1e-4 of a
    weight, usually to 1e-6; the Triton one never waits for the device.

    Args:
        chosen: Hidden states that predict the chosen tokens, `(B, M, D)`, any floating dtype.
        rejected: Hidden states that predict the rejected tokens, `(B, N, D)`.
        chosen_mask: `(B, M)` bool, true at completion tokens; any pattern, empty rows too.
        rejected_mask: `(B, N)` bool.
        reg: Weight of the entropy term, > 0; the release's default is 1, small values give contrast.
        reg_m: Weight of the marginal terms, > 0; the release's default is 0.2.
        cost: See [`pairwise_cost`].
        cost_scale: See [`pairwise_cost`].
        tolerance: See [`unbalanced_sinkhorn`].
        max_iterations: See [`unbalanced_sinkhorn`].
        solver: See [`otpo.solver_choice.choose_solver`]; the result says what ran.
        memory_budget: Bytes of matrices between tokens that are held at a time, at least one pair's: pairs
            beyond that go through in chunks. None: 1 GiB, and 16 MiB on a CPU, which is
            faster on matrices that stay in its caches.

    Returns:
        Weights in float64 for float64 states and in float32 otherwise.

    Raises:
        ValueError: An option is outside its range, or the kernels were asked for and cannot run.
    """
    check_positive(reg=reg, reg_m=reg_m)
    check_cost(cost)
    check_cost_scale(cost_scale)
    if memory_budget is None:
        memory_budget = 1 << (24 if chosen.device.type == "cpu" else 30)
    tensors = (chosen, rejected, chosen_mask, rejected_mask)
    settings = {"reg": reg, "reg_m": reg_m, "tolerance": tolerance, "max_iterations": max_iterations}
    if choose_solver(solver, chosen, rejected, reg=reg, reg_m=reg_m, tolerance=tolerance) == "triton":
        from otpo_kernels.sinkhorn import token_transport

        kind = {"cosine": cost == "cosine", "release_scale": cost_scale == "release"}
        solved = token_transport(*tensors, **settings, **kind, memory_budget=memory_budget)
        return TransportWeights(*solved, solver="triton")
    size = max(1, memory_budget // max(1, 8 * _MATRICES * chosen.size(1) * rejected.size(1)))
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    solved = [_torch_weights(*chunk, cost=cost, cost_scale=cost_scale, settings=settings) for chunk in chunks]
    weights = [torch.cat(parts) for parts in zip(*solved, strict=True)]
    return TransportWeights(*weights, solver="torch")


@torch.no_grad()
def transport_plan(
    chosen: Tensor,
    rejected: Tensor,
    *,
    reg: float = 1.0,
    reg_m: float = 0.2,
    cost: Cost = "euclidean",
    cost_scale: CostScale = "release",
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Tensor:
    """The transport plan of one pair, scaled so that its marginals are the weights of [`transport_weights`].

    `G_ij` is what the weight of chosen token `i` and of rejected token `j` have in common; `G` sums to
    `min(M, N)`. For looking at: it holds a number for each pair of tokens, which training never does outside
    the solver.

    Args:
        chosen: Hidden states that predict the chosen tokens, `(M, D)`, without padding, any floating dtype.
        rejected: Hidden states that predict the rejected tokens, `(N, D)`.
        reg: See [`transport_weights`], and so are the other options.
        reg_m: See there.
        cost: See there.
        cost_scale: See there.
        tolerance: See there.
        max_iterations: See there.

    Returns:
        `(M, N)` in float64 (float32 on devices without it). `G 1` are the chosen weights; `G^T 1` the rejected ones,
        up to the tolerance. Zero rows or columns for an empty response.

    Raises:
        ValueError: An option is outside its range.
    """
    check_positive(reg=reg, reg_m=reg_m)
    check_cost(cost)
    check_cost_scale(cost_scale)
    if not len(chosen) or not len(rejected):
        return torch.zeros(len(chosen), len(rejected), dtype=torch.float64, device=chosen.device)
    chosen, rejected = chosen.unsqueeze(0), rejected.unsqueeze(0)
    masks = [torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) for states in (chosen, rejected)]
    costs = pairwise_cost(chosen, rejected, *masks, cost=cost, scale=cost_scale)
    solved = unbalanced_sinkhorn(
        costs, *masks, reg=reg, reg_m=reg_m, tolerance=tolerance, max_iterations=max_iterations
    )
    plan = solved.plan(costs, reg)[0]
    return plan * (min(plan.shape) / plan.sum())


def _directions(states: Tensor) -> Tensor:
    """States over their norms, however small; zeros stay zeros."""
    norms = states.norm(dim=2, keepdim=True)
    return states / norms.masked_fill(norms == 0, 1.0)


def _torch_weights(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    cost: Cost,
    cost_scale: CostScale,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected weights, residual and iterations; finding the longest completion waits for the device."""
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, chosen_index, chosen_valid = _gather_left(chosen, chosen_mask)
    rejected, rejected_index, rejected_valid = _gather_left(rejected, rejected_mask)
    costs = pairwise_cost(chosen, rejected, chosen_valid, rejected_valid, cost=cost, scale=cost_scale)
    solved = unbalanced_sinkhorn(costs, chosen_valid, rejected_valid, **settings)
    budget = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1)).to(costs.dtype)
    return (
        _scatter_back(solved.chosen_marginal, budget, chosen_index, chosen_mask).to(dtype),
        _scatter_back(solved.rejected_marginal, budget, rejected_index, rejected_mask).to(dtype),
        solved.residual.to(dtype),
        solved.iterations,
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
