"""The weightings that look at no hidden states, each a pure function of a [`PairBatch`].

Shapes: B pairs, T positions; weights are `(2B, T)`, in the dtype of the log-probabilities.
"""

from collections.abc import Sequence
from math import frexp

import torch
from torch import Tensor

from .batch import PairBatch, TokenWeights, Weighting


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


def confpo(batch: PairBatch) -> Tensor:
    """One on the tokens that the policy is less sure of than it is of the response's tokens on average, else zero.

        w_i = 1 where pi(y_i) < mean_j pi(y_j), else 0

    The mean is that of the probabilities, not of their logarithms, and the policy is that of the training step.

    Source: ConfPO, arXiv 2506.08712. The official code divides each response's sum by the number of its selected
    tokens, as SimPO does by the length, and leaves out pairs in which a response has none, such as those with a
    response of one token. Here both responses of such a pair weigh nothing. `loss_type="sigmoid_norm"` divides by
    the number of selected tokens too; other losses take the sum. `weighting="uniform*confpo"` scales it to the budget.
    """
    probabilities = batch.logps.exp().masked_fill(~batch.mask, 0.0)
    mean = probabilities.sum(1, keepdim=True) / batch.lengths.clamp(min=1)
    # Equal probabilities are none below their mean, whose rounding says nothing.
    selected = (probabilities < mean * (1 - 4 * torch.finfo(mean.dtype).eps)) & batch.mask
    chosen, rejected = selected.any(1, keepdim=True).chunk(2)
    return (selected & (chosen & rejected).repeat(2, 1)).to(batch.logps.dtype)


def surprisal(batch: PairBatch) -> Tensor:
    """`-log pi_ref` of each token, scaled to OTPO's budget: what the reference did not expect counts.

    The weights stay the same all through a training, as long as the reference does. Responses that the reference is
    sure of, to the last bit, get the weights of `budget`.

    Source: ours.

    Raises:
        ValueError: The batch comes without a reference.
    """
    if batch.reference_logps is None:
        raise ValueError(
            "`weighting='surprisal'` is made of the reference's log-probabilities, and no reference is asked. Give "
            "one (`--reference` of `otpo explain`), or set another `weighting`."
        )
    return within_budget((-batch.reference_logps).clamp(min=0.0), batch)


def diff(batch: PairBatch, *, base: float = 0.2) -> Tensor:
    """Tokens that an alignment of both responses does not match count 1, the others `base`, scaled to OTPO's budget.

        w_i = v_i * min(|y_c|, |y_r|) / sum_j v_j,   v_i = 1 for unmatched tokens, else base

    The alignment is made of the tokens, once, when the dataset is prepared. At `base` 1 these are the weights of
    `budget`; so they are at 0 for a response all of whose tokens are matched.

    Source: RLHF-V (arXiv 2312.00849), which counts changed segments 5 times and divides by the sum of the weights:
    `base` 0.2. The budget takes the place of its divisor, so that this differs from `budget` in nothing but where the
    weight goes.
    """
    return within_budget(torch.where(_token_values(batch, "unmatched") > 0, 1.0, base).to(batch.logps.dtype), batch)


def columns(batch: PairBatch) -> Tensor:
    """The weights in the dataset's columns `chosen_weights` and `rejected_weights`, as they are.

    See [`otpo.data.given_weights`] for what they hold. Ones are DPO, to the last bit.
    """
    return _token_values(batch, "given_weights").to(batch.logps.dtype)


def product(batch: PairBatch, *, factors: Sequence[Weighting]) -> TokenWeights:
    """The product of several weightings, scaled to OTPO's budget; that of `budget` where a response's is all zero.

    Args:
        batch: B pairs.
        factors: Weightings. Numbers that they want to have logged are all logged; of two of a name the last.
    """
    values, metrics = torch.ones_like(batch.logps), {}
    for factor in factors:
        answer = factor(batch)
        weights, numbers = answer if isinstance(answer, TokenWeights) else (answer, {})
        weights = weights if weights.is_floating_point() else weights.to(values.dtype)  # a mask, or counts
        # Scaled before and behind, so that factors of any size neither overflow nor vanish.
        values, metrics = _scaled(values * _scaled(weights, batch), batch), {**metrics, **numbers}
    return TokenWeights(within_budget(values, batch), metrics)


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
    values = _scaled(values, batch)
    total = values.sum(1, keepdim=True)
    least = torch.finfo(values.dtype).tiny
    scaled = values * (batch.shorter / total.clamp(min=least))
    return torch.where(total >= least, scaled, budget(batch).to(values.dtype)).masked_fill(~batch.mask, 0.0)


def _scaled(values: Tensor, batch: PairBatch) -> Tensor:
    """Values of which each response's largest is within [0.5, 1), so that no sum or product of them overflows.

    They are divided by powers of two, which rounds nothing: the proportions stay the same to the last bit.
    """
    values = values.masked_fill(~batch.mask, 0.0)
    if not values.shape[1]:
        return values
    largest, least = values.detach().amax(1, keepdim=True), torch.finfo(values.dtype).tiny
    if largest.device.type == "mps":  # torch has no frexp there; the largest becomes 1, with a rounding
        return values / largest.clamp(min=least)
    # The inverse of a subnormal number is infinite. With an exponent of integers torch would lose the gradient.
    exponent = torch.frexp(largest).exponent.clamp(min=frexp(least)[1])
    return torch.ldexp(values, -exponent.to(values.dtype))


def _token_values(batch: PairBatch, name: str) -> Tensor:
    if name not in batch.token_values:
        raise ValueError(
            f"The batch has no {name!r} of its tokens. They are made when a dataset is prepared: pass it to the "
            "trainer as `train_dataset` or `eval_dataset`, or to `evaluate`. Set the weighting by its name in "
            "`OTPOConfig`, or pass `otpo.weighting.diff` or `columns` as the trainer's `weighting`, alone or by "
            "`functools.partial`. Around them, a callable of your own names what it looks at in an attribute "
            "`token_values`, a tuple such as `(otpo.weighting.token_values.UNMATCHED,)`."
        )
    return batch.token_values[name]


_LOW_32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64 arithmetic; wrapping products keep their low 32 bits right."""
    x = x & _LOW_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
