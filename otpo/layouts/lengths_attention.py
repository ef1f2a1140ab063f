"""Causal attention over rows without padding, whose pairs may share a prefix, by flash kernels.

A branch's tokens see the prefix of their pair and themselves. That is two calls of the kernel: every segment causally
over itself, and the branches over their prefixes without a mask. Their outputs are averaged by their shares of the
softmax's mass, which the kernels return as a logarithm. The gradient needs no derivative of that average: the kernels'
backward takes probabilities from the logarithm of the mass that it is given, so each part gets the whole one
(FlashAttention-2, arXiv 2307.08691, section 3; as in ring attention, arXiv 2310.01889).

The kernels take half precision on CUDA alone; [`masked_attention`] is the reference, in plain torch.

Shapes: N tokens, H query heads, K key heads, D head dimension, B pairs, P shared tokens.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otpo_kernels.flash import Segments, flash_backward, flash_forward


class RowLengths(NamedTuple):
    """Which tokens belong together, see [`otpo.layouts.plan.RowPlan`].

    Attributes:
        segment_ends: See there.
        branch_ends: See there.
        shared_ends: See there.
        bounds: The other numbers of the plan, as the kernels are told.
        shares: Whether any token is shared.
        longest_row: How many tokens a row of the run may have; None for any number.
    """

    segment_ends: Tensor
    branch_ends: Tensor
    shared_ends: Tensor
    bounds: "Bounds"
    shares: bool
    longest_row: int | None = None


class Bounds:
    """Numbers of a batch that kernels need on the host: a tensor there, which nobody moves to the device.

    Numbers by themselves would be guarded by a compiled graph, which asks for another graph when two of them that were
    equal at first differ. Engines move tensors within tuples and dictionaries to the device, and reading them there
    would be a wait; of an object of this class they know nothing.

    Attributes:
        values: `[4]` int64 on the CPU: how many tokens are shared, and bounds of the longest segment, branch and
            shared part.
    """

    def __init__(self, shared_tokens: int, longest_segment: int, longest_branch: int, longest_shared: int) -> None:
        numbers = [shared_tokens, longest_segment, longest_branch, longest_shared]
        self.values = torch.tensor(numbers, device="cpu")  # whatever the default device is


class _Calls(NamedTuple):
    """The two calls of the kernels.

    Attributes:
        segments: Each segment over itself.
        crossing: The branches over their prefixes.
        parts: The prefixes and the branches within all tokens; None if nothing is shared, or nothing is not.
    """

    segments: Segments
    crossing: Segments
    parts: tuple[slice, slice] | None


def _calls(
    tokens: int, segment_ends: Tensor, branch_ends: Tensor, shared_ends: Tensor, bounds: Tensor, left: int
) -> _Calls:
    shared, longest_segment, longest_branch, longest_shared = bounds.tolist()  # on the CPU, so nothing waits
    return _Calls(
        Segments(segment_ends, segment_ends, longest_segment, longest_segment, True, left),
        Segments(branch_ends, shared_ends, longest_branch, longest_shared, False),
        None if shared in (0, tokens) else (slice(None, shared), slice(shared, None)),
    )


def lengths_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: RowLengths, scale: float, window: int | None = None
) -> Tensor:
    """Attention of each token to the tokens before it in its own row, `[N, H, D]`, differentiable once.

    Args:
        query: `[N, H, D]`, float16 or bfloat16 on CUDA.
        key: `[N, K, D]`, with H a multiple of K.
        value: `[N, K, D]`.
        lengths: The rows.
        scale: Multiplies the products of queries and keys.
        window: How many tokens each one sees, itself included; None for all. Not with shared tokens, unless no row of
            the run is longer.

    Raises:
        ValueError: A window, and shared tokens.
    """
    window = binding_window(window, lengths.longest_row)
    if window is not None and lengths.shares:
        raise ValueError("A sliding window can't be told by lengths where pairs share a prefix: pack without sharing.")
    left = -1 if window is None else window - 1
    # Contiguous before they are kept for the gradient, which would copy them again.
    parts = (part.contiguous() for part in (query, key, value))
    return _attend(*parts, *lengths[:3], lengths.bounds.values, scale, left)[0]


def binding_window(window: int | None, longest_row: int | None) -> int | None:
    """A sliding window, or None if no row is longer than it."""
    return None if window is not None and longest_row is not None and longest_row <= window else window


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same by a mask, `[N, H, D]`, in the precision of the inputs: the reference of the kernels.

    Args:
        query: `[N, H, D]`.
        key: `[N, K, D]`.
        value: `[N, K, D]`.
        mask: `[N, N]` bool, true where a query sees a key, see [`row_mask`].
        scale: Multiplies the products of queries and keys.
    """
    groups = query.size(1) // key.size(1)
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~mask, -math.inf).softmax(-1), value)


def row_mask(pairs: Tensor, branches: Tensor) -> Tensor:
    """Which token sees which, `[N, N]` bool: those of its pair before it, of its own branch or of the shared prefix.

    Args:
        pairs: `[N]`, see [`otpo.layouts.plan.RowPlan`].
        branches: `[N]`, see there.
    """
    places = torch.arange(len(pairs), device=pairs.device)
    sees = (pairs[:, None] == pairs) & (places[:, None] >= places)
    return sees & ((branches == 0) | (branches[:, None] == branches))


# The two operators below are opaque to `torch.compile`, which could not trace the kernels' wrappers with lengths that
# differ from batch to batch.


@torch.library.custom_op("otpo::lengths_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_ends: Tensor,
    branch_ends: Tensor,
    shared_ends: Tensor,
    bounds: Tensor,
    scale: float,
    left: int,
) -> tuple[Tensor, Tensor]:
    """The output `[N, H, D]`, and the logarithm of the softmax's mass `[H, N]` in float32."""
    query, key, value = (part.contiguous() for part in (query, key, value))
    calls = _calls(len(query), segment_ends, branch_ends, shared_ends, bounds, left)
    output, log_mass = flash_forward(query, key, value, calls.segments, scale)
    if calls.parts is None:
        return output, log_mass

    # What the branches see of their prefixes, which is nothing for a pair without one.
    prefix, branch = calls.parts
    seen, seen_mass = flash_forward(query[branch], key[prefix], value[prefix], calls.crossing, scale)

    # Each part weighs as much as its share of the whole mass.
    own_mass = log_mass[:, branch]
    whole = torch.logaddexp(own_mass, seen_mass)
    own_share, seen_share = ((part - whole).exp().t().unsqueeze(2) for part in (own_mass, seen_mass))
    output[branch] = (output[branch] * own_share + seen * seen_share).to(output.dtype)
    return output, torch.cat([log_mass[:, prefix], whole], 1)


@_attend.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    tokens, heads, _dim = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("otpo::lengths_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_mass: Tensor,
    segment_ends: Tensor,
    branch_ends: Tensor,
    shared_ends: Tensor,
    bounds: Tensor,
    scale: float,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value = (part.contiguous() for part in (grad, query, key, value))
    calls = _calls(len(query), segment_ends, branch_ends, shared_ends, bounds, left)
    grads = flash_backward(grad, query, key, value, output, log_mass, calls.segments, scale)
    if calls.parts is None:
        return grads

    # The same probabilities and outputs, of the whole softmax, over the prefixes.
    prefix, branch = calls.parts
    of_branch, of_key, of_value = flash_backward(
        *(grad[branch], query[branch], key[prefix], value[prefix], output[branch], log_mass[:, branch].contiguous()),
        calls.crossing,
        scale,
    )
    grad_query, grad_key, grad_value = grads
    grad_query[branch] += of_branch
    grad_key[prefix] += of_key
    grad_value[prefix] += of_value
    return grad_query, grad_key, grad_value


@_attend_backward.register_fake
def _(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.numbers = inputs[7:]


def _backward(ctx: Any, grad: Tensor, _grad_log_mass: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * 6)


_attend.register_autograd(_backward, setup_context=_keep_for_backward)
