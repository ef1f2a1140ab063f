"""The memcpy operator: token rows moved between the order of tokens and the order of experts.

Shapes: T tokens, K slots of a token, H hidden size, E experts, R rows in the order of experts.

    routing = route(top_k_index, num_experts)
    rows = permute(hidden_states, routing)  # (R, H), each group of rows is one expert's
    ...  # grouped products, whose groups end at routing.offsets
    output = unpermute(rows, routing, top_k_weights)  # (T, H)

Compass-v3 (arXiv 2509.09121) names a customised memcpy operator for this move and publishes nothing of it: the design
is ours. A row is read once and written K times, or read K times and written once; sums run in float32 (float64 for
float64) in the order of slots, so that results are the same from run to run. `permute` and the plain `unpermute` are
each other's backward; that of the weighted `unpermute` reads the gradient once for all K slots and gives the weights'
gradient in the same pass.

On a GPU these are Triton kernels, elsewhere the references in plain torch below. Offsets are 64-bit: tensors may have
2**31 elements and more, as long as T * K is below 2**31. Gradients of gradients are not covered.
"""

from typing import Any

import torch
from torch import Tensor

from .backend import runs_in_triton
from .routing import Routing as Routing
from .routing import route as route
from .routing import route_by_counts as route_by_counts


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Copies each token's row to the rows of its slots.

    Args:
        x: `(T, H)`, any floating dtype.
        routing: Of the same tokens.

    Returns:
        `(R, H)`. Rows that belong to no slot, which are padding and those from `offsets[-1]` on, are zero.

    Raises:
        ValueError: `x` does not have one row for each token of `routing`.
    """
    tokens = len(routing.destinations)
    if x.dim() != 2 or len(x) != tokens:
        raise ValueError(f"`x` must have shape ({tokens}, hidden), a row for each token, got {tuple(x.shape)}.")
    return _permute(x, routing.destinations, routing.offsets, routing.counts, routing.rows)


def unpermute(rows: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """Sums the rows of each token's slots, weighted where weights are given.

    Args:
        rows: `(R, H)`, any floating dtype. Rows that belong to no slot are not read, whatever they hold.
        routing: What `rows` are ordered by.
        weights: `(T, K)`, any floating dtype. Their gradient is zero at dropped slots.

    Returns:
        `(T, H)` in the dtype of `rows`; zero for a token all of whose slots were dropped.

    Raises:
        ValueError: A shape does not fit `routing`.
    """
    if rows.dim() != 2 or len(rows) != routing.rows:
        raise ValueError(f"`rows` must have shape ({routing.rows}, hidden), got {tuple(rows.shape)}.")
    if weights is not None and weights.shape != routing.destinations.shape:
        raise ValueError(
            f"`weights` must have shape {tuple(routing.destinations.shape)}, one for each slot, "
            f"got {tuple(weights.shape)}."
        )
    return _unpermute(rows, weights, routing.destinations, routing.offsets, routing.counts)


def reorder(rows: Tensor, counts: Tensor, *, alignment: int = 1) -> tuple[Tensor, Routing]:
    """Brings rows that stand by source and then by expert into the order of experts.

    Args:
        rows: `(N, H)`, as an all-to-all of S sources delivers them.
        counts: `(S, E)` int32 or int64, the rows of each source for each expert, on the device.
        alignment: See [`route`].

    Returns:
        The rows by expert, and the routing, with which `unpermute` takes results back.
    """
    routing = route_by_counts(counts, len(rows), alignment=alignment)
    return permute(rows, routing), routing


def permute_reference(x: Tensor, destinations: Tensor, rows: int) -> Tensor:
    """What the kernel computes, in plain torch."""
    out = x.new_zeros(rows + 1, x.size(1))  # dropped slots land in the last row
    for of_slot in destinations.long().unbind(1):
        out[torch.where(of_slot < 0, rows, of_slot)] = x
    return out[:-1].clone()


def unpermute_reference(rows: Tensor, destinations: Tensor, weights: Tensor | None) -> Tensor:
    """What the kernel computes, in plain torch."""
    accumulate = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_zeros(len(destinations), rows.size(1), dtype=accumulate)
    for slot, (index, present) in enumerate(_slots(destinations)):
        if len(rows):
            row = rows[index].to(accumulate)
            row = row if weights is None else row * weights[:, slot, None].to(accumulate)
            out += torch.where(present[:, None], row, 0.0)
    return out.to(rows.dtype)


def unpermute_backward_reference(
    grad: Tensor, rows: Tensor, weights: Tensor, destinations: Tensor
) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in plain torch."""
    accumulate = torch.promote_types(rows.dtype, torch.float32)
    grad = grad.to(accumulate)
    grad_rows, grad_weights = rows.new_zeros(len(rows) + 1, rows.size(1)), torch.zeros_like(weights)
    for slot, (index, present) in enumerate(_slots(destinations)):
        if len(rows):
            weighted = grad * weights[:, slot, None].to(accumulate)
            grad_rows[torch.where(present, index, len(rows))] = weighted.to(rows.dtype)
            dot = (rows[index].to(accumulate) * grad).sum(1)
            grad_weights[:, slot] = torch.where(present, dot, 0.0).to(weights.dtype)
    return grad_rows[:-1].clone(), grad_weights


def _slots(destinations: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each slot the rows, 0 where it was dropped, and whether it was not."""
    return [(of_slot.clamp(min=0), of_slot >= 0) for of_slot in destinations.long().unbind(1)]


@torch.library.custom_op("otpo::permute", mutates_args=())
def _permute(x: Tensor, destinations: Tensor, offsets: Tensor, counts: Tensor, rows: int) -> Tensor:
    if not runs_in_triton(x):
        return permute_reference(x, destinations, rows)
    from . import memcpy_kernels

    return memcpy_kernels.permute(x, destinations, offsets, counts, rows)


@_permute.register_fake
def _(x: Tensor, destinations: Tensor, offsets: Tensor, counts: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.size(1))


@torch.library.custom_op("otpo::unpermute", mutates_args=())
def _unpermute(rows: Tensor, weights: Tensor | None, destinations: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    if not runs_in_triton(rows):
        return unpermute_reference(rows, destinations, weights)
    from . import memcpy_kernels

    return memcpy_kernels.unpermute(rows, destinations, weights)


@_unpermute.register_fake
def _(rows: Tensor, weights: Tensor | None, destinations: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(destinations.size(0), rows.size(1))


@torch.library.custom_op("otpo::unpermute_backward", mutates_args=())
def _unpermute_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, destinations: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    if not runs_in_triton(rows):
        return unpermute_backward_reference(grad, rows, weights, destinations)
    from . import memcpy_kernels

    return memcpy_kernels.unpermute_backward(grad, rows, weights, destinations, offsets, counts)


@_unpermute_backward.register_fake
def _(
    grad: Tensor, rows: Tensor, weights: Tensor, destinations: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save_for_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *routing, _ = inputs
    ctx.save_for_backward(*routing)


def _permute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpermute(grad, None, *ctx.saved_tensors), None, None, None, None


def _save_for_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, *routing = inputs
    ctx.rows = rows.size(0)  # `len` would make a number of it that a graph holds for good
    ctx.save_for_backward(None if weights is None else rows, weights, *routing)


def _unpermute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, *routing = ctx.saved_tensors
    if weights is None:
        return _permute(grad, *routing, ctx.rows), None, None, None, None
    return *_unpermute_backward(grad, rows, weights, *routing), None, None, None


_permute.register_autograd(_permute_gradients, setup_context=_save_for_permute)
_unpermute.register_autograd(_unpermute_gradients, setup_context=_save_for_unpermute)
