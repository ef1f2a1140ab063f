"""The weightings that look at lengths, positions and tokens alone, each a pure function of a [`PairBatch`].

Shapes: B pairs, T positions; weights are `(2B, T)`, in the dtype of the log-probabilities.
"""

import torch
from torch import Tensor

from .batch import PairBatch


def uniform(batch: PairBatch) -> Tensor:
    """Ones: DPO."""
    return torch.ones_like(batch.logps)


def budget(batch: PairBatch) -> Tensor:
    """`min(|y_c|, |y_r|) / |y|`: every token alike, with OTPO's total weight.

    The ablation that matters most: 52.60 of OTPO's 53.37 on AlpacaEval 2 in the paper's own table.
    """
    return (batch.shorter / batch.lengths.clamp(min=1)).expand_as(batch.logps)


def length(batch: PairBatch) -> Tensor:
    """`1 / |y|`: the mean log-ratio, SimPO's normalisation (arXiv 2405.14734) with a reference model."""
    return (1.0 / batch.lengths.clamp(min=1)).expand_as(batch.logps)


def sampo(batch: PairBatch, *, seed: int = 0) -> Tensor:
    """One on a random subset of `min(|y_c|, |y_r|)` tokens of each response, else zero.

    Source: SamPO, arXiv 2406.10957. The official code draws anew for the reference model; here policy and
    reference share a draw. The draw is a hash of the seed, the step, the response's tokens and the position, so
    it does not depend on the batch, the device, the number of processes or a resume.
    """
    seeds = torch.full_like(batch.token_ids[:, :1], seed)
    draw_keys = _mix(_mix(seeds) + batch.step)
    token_keys = _mix(batch.token_ids + _mix(batch.positions))
    row_keys = _mix(token_keys.masked_fill(~batch.mask, 0).sum(1, keepdim=True) & _LOW_32)
    scores = _mix(_mix(batch.positions) ^ row_keys ^ draw_keys)
    order = scores.masked_fill(~batch.mask, _LOW_32 + 1).argsort(dim=1, stable=True)
    rank = order.argsort(1)
    return (rank < batch.shorter).to(batch.logps.dtype)


def ld(batch: PairBatch, *, alpha: float = 0.5) -> Tensor:
    """One up to the shorter response's length and `alpha`, in [0, 1], past it: LD-DPO, arXiv 2409.06411."""
    return torch.where(batch.positions < batch.shorter, 1.0, alpha).to(batch.logps.dtype)


def d2po(batch: PairBatch, *, gamma: float = 0.98) -> Tensor:
    """`gamma^t`, t from 0 at the first token, gamma in (0, 1]: earlier tokens count more.

    Source: D2PO, arXiv 2502.14340. Its code counts from 1, which is this times gamma.
    """
    return torch.pow(gamma, batch.positions.clamp(min=0)).to(batch.logps.dtype)


def within_budget(values: Tensor, batch: PairBatch) -> Tensor:
    """Values in the proportions that they have, scaled so that each response's sum is OTPO's budget.

        w_i = v_i * min(|y_c|, |y_r|) / sum_j v_j

    Where a response's values are all zero there are no proportions: it gets those of [`budget`], all alike.

    Args:
        values: `(2B, T)` float, non-negative; whatever stands outside the mask.
        batch: B pairs.

    Returns:
        `(2B, T)` in the dtype of the values, zero outside the mask.
    """
    values = values.masked_fill(~batch.mask, 0.0)
    total = values.sum(1, keepdim=True)
    least = torch.finfo(values.dtype).tiny
    scaled = values * (batch.shorter / total.clamp(min=least))
    return torch.where(total >= least, scaled, budget(batch).to(values.dtype)).masked_fill(~batch.mask, 0.0)


_LOW_32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 arithmetic; wrapping products keep their low 32 bits right."""
    x = x & _LOW_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
