"""The transport in plain torch, from hidden states to token weights: the reference of every other solver.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, W of either, D hidden size.

It works in float64 (float32 on devices without it, which is Apple's MPS): in float32 the residual of stiff problems
stalls near 1e-5, where the solver stops, and nearly equal hidden states come out 1e-4 of their norm apart.
"""

import torch
from torch import Tensor

from .cost import pairwise_cost
from .options import TransportOptions
from .sinkhorn import unbalanced_sinkhorn
from .solution import TransportWeights

# Matrices of float64 that are held of every pair at the peak: the cost, the kernel and two sums.
_MATRICES = 4


def solve(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    options: TransportOptions,
    memory_budget: int,
) -> TransportWeights:
    """Token weights in float64 for float64 states and in float32 otherwise.

    Arguments as in [`otpo.transport.solve.solve`].
    """
    size = max(1, memory_budget // max(1, 8 * _MATRICES * chosen.size(1) * rejected.size(1)))
    tensors = (chosen, rejected, chosen_mask, rejected_mask)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    parts = zip(*(_solve_chunk(*chunk, options=options) for chunk in chunks), strict=True)
    *weights, solved = [torch.cat(part) for part in parts]
    return TransportWeights(*weights, solver="torch", solved=solved)


def _solve_chunk(
    chosen: Tensor, rejected: Tensor, chosen_mask: Tensor, rejected_mask: Tensor, options: TransportOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected weights, residual, iterations, whether solved; finding the longest completion waits."""
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, chosen_index, chosen_valid = _gather_left(chosen, chosen_mask)
    rejected, rejected_index, rejected_valid = _gather_left(rejected, rejected_mask)
    valid = chosen_valid, rejected_valid
    costs = pairwise_cost(chosen, rejected, *valid, cost=options.cost, scale=options.cost_scale)
    solved = unbalanced_sinkhorn(costs, *valid, **options.numbers)
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
