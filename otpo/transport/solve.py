"""OTPO's token weights: the marginals of unbalanced optimal transport between two responses' hidden states.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, D hidden size.

`transport_weights` is the whole way from hidden states to weights. It runs in the Triton kernels of
`otpo_kernels.sinkhorn` or, as their reference, here and in `otpo.transport.sinkhorn`, in plain torch. The torch way
works in float64 (float32 on devices without it, which is Apple's MPS): in float32 the residual of stiff problems
stalls near 1e-5, where the solver stops, and nearly equal hidden states come out 1e-4 of their norm apart.

Padding is masked, never replaced by zero vectors: rows and columns outside the masks carry no mass.
Nothing here is differentiable; the weights are constants of the loss.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.utils import logging

from .backend import Solver, choose_solver
from .sinkhorn import check_positive, unbalanced_sinkhorn, wide_dtype

logger = logging.get_logger(__name__)

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
    wide = wide_dtype(chosen.device)
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

    Only real tokens enter the problem, so prompts and padding cost nothing. Weights are shares of the plan's mass,
    taken in the logarithm, so they sum to the budget however small `reg_m` makes the mass. Where the solver stops
    above its tolerance, which happens to `reg` below 0.01 and to `reg_m` a thousand times `reg`, a warning says so and
    what to set: at once where the host waits for the result anyway, which is everywhere but in Triton on a GPU; there
    look at `residual`, as the trainer does when it logs.

    The two solvers agree to 1e-5 of a weight, usually to 1e-6. Where all states share a part ten times as large as
    what tells them apart, the kernels' float32 sums cancel: the difference then grows with `1 / reg`, up to 3e-4 at
    `reg` 0.02. The Triton solver never waits for the device.

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
        solver: See [`otpo.transport.backend.choose_solver`]; the result says what ran.
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
        found = TransportWeights(*solved, solver="triton")
        if found.residual.device.type == "cpu":
            _warn_unsolved(found.residual, found.residual <= tolerance, settings)
        return found
    size = max(1, memory_budget // max(1, 8 * _MATRICES * chosen.size(1) * rejected.size(1)))
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    solved = [_torch_weights(*chunk, cost=cost, cost_scale=cost_scale, settings=settings) for chunk in chunks]
    *weights, finished = [torch.cat(parts) for parts in zip(*solved, strict=True)]
    found = TransportWeights(*weights, solver="torch")
    _warn_unsolved(found.residual, finished, settings)
    return found


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
        up to the tolerance. Zero rows or columns for an empty response; NaN where a state is not finite.

    Raises:
        ValueError: An option is outside its range.
    """
    check_positive(reg=reg, reg_m=reg_m)
    check_cost(cost)
    check_cost_scale(cost_scale)
    if not len(chosen) or not len(rejected):
        return torch.zeros(len(chosen), len(rejected), dtype=wide_dtype(chosen.device), device=chosen.device)
    chosen, rejected = chosen.unsqueeze(0), rejected.unsqueeze(0)
    masks = [torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) for states in (chosen, rejected)]
    costs = pairwise_cost(chosen, rejected, *masks, cost=cost, scale=cost_scale)
    settings = {"reg": reg, "reg_m": reg_m, "tolerance": tolerance, "max_iterations": max_iterations}
    solved = unbalanced_sinkhorn(costs, *masks, **settings)
    _warn_unsolved(solved.residual, solved.solved, settings)
    log_plan = solved.log_plan(costs, reg)[0]
    return log_plan.flatten().softmax(0).view_as(log_plan) * min(log_plan.shape)


def warn_unsolved(residual: float, *, reg: float, reg_m: float, tolerance: float, max_iterations: int) -> None:
    """Warns, once for each of these settings, that the solver stopped at a residual above its tolerance.

    Args:
        residual: The largest residual of some pairs, on the host.
        reg: See [`transport_weights`], and so are the other settings.
        reg_m: See there.
        tolerance: See there.
        max_iterations: See there.
    """
    settings = (reg, reg_m, tolerance, max_iterations)
    if residual <= tolerance or settings in _warned:
        return
    _warned.add(settings)
    logger.warning(
        f"The transport solver stopped after {max_iterations} sweeps at a residual of {residual:.1e}, above the "
        f"tolerance of {tolerance:g} (`reg` {reg:g}, `reg_m` {reg_m:g}), so the token weights are not those of the "
        f"plan; they still sum to the budget. Raise `reg` (`ot_reg` in the trainer) to 0.01 or more, lower `reg_m` "
        "(`ot_reg_m`) or allow more `max_iterations` (`ot_max_iterations`)."
    )


_warned: set[tuple[float, float, float, int]] = set()


def _warn_unsolved(residual: Tensor, solved: Tensor, settings: dict[str, Any]) -> None:
    """The same for residuals and verdicts of a batch, `(B,)`; pairs that are not finite are the caller's to report."""
    unsolved = residual.masked_fill(solved | residual.isnan(), 0.0)
    if len(unsolved):
        warn_unsolved(unsolved.max().item(), **settings)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected weights, residual, iterations, whether solved; finding the longest completion waits."""
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, chosen_index, chosen_valid = _gather_left(chosen, chosen_mask)
    rejected, rejected_index, rejected_valid = _gather_left(rejected, rejected_mask)
    costs = pairwise_cost(chosen, rejected, chosen_valid, rejected_valid, cost=cost, scale=cost_scale)
    solved = unbalanced_sinkhorn(costs, chosen_valid, rejected_valid, **settings)
    budget = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1)).to(costs.dtype)
    return (
        _scatter_back(solved.chosen_log_mass, budget, chosen_index, chosen_mask).to(dtype),
        _scatter_back(solved.rejected_log_mass, budget, rejected_index, rejected_mask).to(dtype),
        solved.residual.to(dtype),
        solved.iterations,
        solved.solved,
    )


def _gather_left(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves each row's real tokens to the front: states `(B, W, D)`, their columns and mask `(B, W)`."""
    width = max(int(mask.sum(1).max()), 1)
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    left = states.gather(1, index.unsqueeze(2).expand(-1, -1, states.size(2)))
    return left, index, mask.gather(1, index)


def _scatter_back(log_mass: Tensor, budget: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Shares of the whole mass times the budget, at the tokens' own columns; zero where the budget is."""
    shares = log_mass.softmax(1).masked_fill(budget.unsqueeze(1) == 0, 0.0)
    scaled = shares * budget.unsqueeze(1)
    return torch.zeros(mask.shape, dtype=scaled.dtype, device=scaled.device).scatter(1, index, scaled)
