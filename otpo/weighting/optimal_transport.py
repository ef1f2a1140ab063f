"""Weightings of the transport plan between the two responses of each pair: the mass that it moves, or destroys."""

from typing import Unpack

import torch

from otpo.transport.options import TransportKeywords, TransportOptions
from otpo.transport.solve import solve

from .batch import PairBatch, TokenWeights
from .methods import budget, within_budget

LEAST_DESTROYED = 1e-4
"""Added to the destroyed mass of every token, in units of a token's own mass: ten times what solvers differ by."""


def otpo(batch: PairBatch, **options: Unpack[TransportKeywords]) -> TokenWeights:
    """Marginals of the unbalanced transport plan between the two responses' hidden states.

    Args:
        batch: B pairs.
        **options: As in [`TransportOptions`].

    Raises:
        ValueError: An option is outside its range, or the kernels were asked for and cannot run.
    """
    return by_transport(batch, options=TransportOptions(**options))


def by_transport(batch: PairBatch, *, options: TransportOptions) -> TokenWeights:
    """The same with options that were checked when they were made: what trains.

    Source: OTPO, arXiv 2505.18720, section 3.
    """
    chosen_states, rejected_states = batch.hidden_states.chunk(2)
    chosen_mask, rejected_mask = batch.mask.chunk(2)
    solved = solve(chosen_states, rejected_states, chosen_mask, rejected_mask, options)
    return TokenWeights(
        torch.cat([solved.chosen, solved.rejected]),
        {"transport/residual": solved.residual.max(), "transport/iterations": solved.iterations.max()},
    )


def contrast(batch: PairBatch, *, options: TransportOptions, mix: float = 1.0) -> TokenWeights | torch.Tensor:
    r"""The mass that the transport plan destroys at each token, scaled to OTPO's budget: what has no partner counts.

        d_i = max(0, 1 - w_i),   weight_i = (d_i + eps) * tau / sum_j (d_j + eps),   tau = min(|y_c|, |y_r|)

    `w` are OTPO's weights: the plan's marginals, scaled so that the shorter response moves all of its mass and each
    token's own mass is 1. OTPO itself counts `w_i`, what a token and the other response have in common.

    Why that is the price of a missing partner: each marginal term `reg_m * KL(G 1 | 1)` is paired in the dual with a
    potential `f_i`, and where the dual is at its largest, its derivative gives `(G 1)_i = exp(-f_i / reg_m)`. `f_i` is
    what the objective pays for a little more mass at token `i`: much, where everything in the other response is far.
    Scaling the plan to the budget only moves the price at which a token keeps its mass, so that

        d_i = 1 - exp(-(f_i - f_0) / reg_m)  where f_i > f_0 = reg_m * log(tau / |G|),  else 0,

    which grows with the price, from 0 up to 1, and is `(f_i - f_0) / reg_m` for small ones. Tokens below `f_0` are
    moved with more than their mass and are all alike here.

    Where nothing is destroyed, as between equal responses at a small `reg`, `eps` ([`LEAST_DESTROYED`]) is all there
    is, and the weights are those of `budget`: no solver's rounding is blown up to a whole budget. (A large `reg`
    spreads the mass, so that even between equal responses a token that is unlike the others loses some.) The
    proportions are a response's own, so a response of which little is destroyed, such as a part of the other, spends
    its budget on that little all the same: blend it with `mix`.

    Source: ours. Nobody seems to have published it; RLHF-V (arXiv 2312.00849) stresses what a diff finds changed.

    Args:
        batch: B pairs.
        options: How the problem is posed and solved.
        mix: Share of these weights, in [0, 1]; the rest are the uniform ones of `budget`. At 0 nothing is solved and
            the weights are `budget`'s to the last bit.

    Returns:
        Weights, and beside the solver's numbers `contrast/destroyed`, the mean over responses of `d`'s
        mean.
    """
    if mix == 0.0:
        return budget(batch)
    moved = by_transport(batch, options=options)
    destroyed = destroyed_mass(moved.values, batch)
    values = within_budget(destroyed + LEAST_DESTROYED, batch)
    if mix < 1.0:
        values = torch.lerp(budget(batch).to(values.dtype), values, mix).masked_fill(~batch.mask, 0.0)
    # Of responses, and not of tokens, so that batches of any size have the same mean over their pairs.
    mean = (destroyed.sum(1, keepdim=True) / batch.lengths.clamp(min=1)).mean()
    return TokenWeights(values, {**moved.metrics, "contrast/destroyed": mean})


def destroyed_mass(moved: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """What of each token's own mass the plan destroys, `(2B, T)` within [0, 1], zero outside the mask.

    Args:
        moved: OTPO's weights, `(2B, T)`.
        batch: B pairs.
    """
    return (1.0 - moved).clamp(min=0.0).masked_fill(~batch.mask, 0.0)
