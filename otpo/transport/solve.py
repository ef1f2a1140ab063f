"""OTPO's token weights: the marginals of unbalanced optimal transport between two responses' hidden states.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, D hidden size.

`transport_weights` is the whole way from hidden states to weights, by one of the solvers of `SOLVERS`;
`transport_plan` is the plan itself, of one pair. Each makes a [`TransportOptions`] of its keywords and hands it to
`solve` and `solve_plan`, which take the object.

Padding is masked, never replaced by zero vectors: rows and columns outside the masks carry no mass.
Nothing here is differentiable; the weights are constants of the loss.
"""

from typing import Unpack

import torch
from torch import Tensor
from transformers.utils import logging

from .backend import choose_solver
from .cost import pairwise_cost
from .options import ProblemKeywords, TransportKeywords, TransportOptions
from .registry import SOLVERS
from .sinkhorn import unbalanced_sinkhorn, wide_dtype
from .solution import TransportWeights

logger = logging.get_logger(__name__)


def transport_weights(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    memory_budget: int | None = None,
    **options: Unpack[TransportKeywords],
) -> TransportWeights:
    """OTPO's token weights, see [`solve`].

    Args:
        chosen: See [`solve`], and so are the other tensors.
        rejected: See there.
        chosen_mask: See there.
        rejected_mask: See there.
        memory_budget: See there.
        **options: As in [`TransportOptions`]: `reg`, `reg_m`, `cost`, `cost_scale`, `tolerance`, `max_iterations`,
            `solver`.

    Raises:
        ValueError: An option is outside its range, or the kernels were asked for and cannot run.
    """
    tensors = (chosen, rejected, chosen_mask, rejected_mask)
    return solve(*tensors, TransportOptions(**options), memory_budget=memory_budget)


def transport_plan(chosen: Tensor, rejected: Tensor, **options: Unpack[ProblemKeywords]) -> Tensor:
    """The transport plan of one pair, see [`solve_plan`].

    Args:
        chosen: See [`solve_plan`], and so is `rejected`.
        rejected: See there.
        **options: As in [`TransportOptions`], but `solver`.

    Raises:
        ValueError: An option is outside its range.
    """
    return solve_plan(chosen, rejected, TransportOptions(**options, solver="torch"))


@torch.no_grad()
def solve(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    options: TransportOptions,
    *,
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
        options: How the problem is posed and solved; the result says which solver ran.
        memory_budget: Bytes of matrices between tokens that are held at a time, at least one pair's: pairs
            beyond that go through in chunks. None: 1 GiB, and 16 MiB on a CPU, which is
            faster on matrices that stay in its caches.

    Returns:
        Weights in float64 for float64 states and in float32 otherwise.

    Raises:
        ValueError: The kernels were asked for and cannot run.
    """
    if memory_budget is None:
        memory_budget = 1 << (24 if chosen.device.type == "cpu" else 30)
    name = choose_solver(options, chosen, rejected)
    found = SOLVERS[name].load()(chosen, rejected, chosen_mask, rejected_mask, options, memory_budget)
    if found.solved is not None:
        _warn_unsolved(found.residual, found.solved, options)
    return found


@torch.no_grad()
def solve_plan(chosen: Tensor, rejected: Tensor, options: TransportOptions) -> Tensor:
    """The transport plan of one pair, scaled so that its marginals are the weights of [`solve`].

    `G_ij` is what the weight of chosen token `i` and of rejected token `j` have in common; `G` sums to
    `min(M, N)`. For looking at: it holds a number for each pair of tokens, which training never does outside
    the solver. It is made in plain torch, whatever `options.solver` is: the kernels keep no plan.

    Args:
        chosen: Hidden states that predict the chosen tokens, `(M, D)`, without padding, any floating dtype.
        rejected: Hidden states that predict the rejected tokens, `(N, D)`.
        options: How the problem is posed and how far it is solved.

    Returns:
        `(M, N)` in float64 (float32 on devices without it). `G 1` are the chosen weights; `G^T 1` the rejected ones,
        up to the tolerance. Zero rows or columns for an empty response; NaN where a state is not finite.
    """
    if not len(chosen) or not len(rejected):
        return torch.zeros(len(chosen), len(rejected), dtype=wide_dtype(chosen.device), device=chosen.device)
    chosen, rejected = chosen.unsqueeze(0), rejected.unsqueeze(0)
    masks = [torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) for states in (chosen, rejected)]
    costs = pairwise_cost(chosen, rejected, *masks, cost=options.cost, scale=options.cost_scale)
    solved = unbalanced_sinkhorn(costs, *masks, **options.numbers)
    _warn_unsolved(solved.residual, solved.solved, options)
    log_plan = solved.log_plan(costs, options.reg)[0]
    return log_plan.flatten().softmax(0).view_as(log_plan) * min(log_plan.shape)


def warn_unsolved(residual: float, options: TransportOptions) -> None:
    """Warns, once for each of these settings, that the solver stopped at a residual above its tolerance.

    Args:
        residual: The largest residual of some pairs, on the host.
        options: Those that they were solved with.
    """
    settings = tuple(options.numbers.values())
    if residual <= options.tolerance or settings in _warned:
        return
    _warned.add(settings)
    logger.warning(
        f"The transport solver stopped after {options.max_iterations} sweeps at a residual of {residual:.1e}, above "
        f"the tolerance of {options.tolerance:g} (`reg` {options.reg:g}, `reg_m` {options.reg_m:g}), so the token "
        "weights are not those of the plan; they still sum to the budget. Raise `reg` (`ot_reg` in the trainer) to "
        "0.01 or more, lower `reg_m` (`ot_reg_m`) or allow more `max_iterations` (`ot_max_iterations`)."
    )


_warned: set[tuple[float, ...]] = set()


def _warn_unsolved(residual: Tensor, solved: Tensor, options: TransportOptions) -> None:
    """The same for residuals and verdicts of a batch, `(B,)`; pairs that are not finite are the caller's to report."""
    unsolved = residual.masked_fill(solved | residual.isnan(), 0.0)
    if len(unsolved):
        warn_unsolved(unsolved.max().item(), options)
