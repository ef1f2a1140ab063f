"""Where each token's rows go when rows are grouped by expert, without a sort and without a wait for the host.

Shapes: T tokens, K slots of a token, E experts or groups, S sources, R rows in the order of experts.

`route` places the slots of a router's choice, `route_by_counts` whole chunks, as they arrive when every source has
sorted its own rows by expert. Both give a [`Routing`], which `memcpy.permute` and `memcpy.unpermute` follow.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import runs_in_triton

DEBUG = os.environ.get("OTPO_KERNELS_DEBUG", "0") == "1"
"""Whether `route` looks for experts out of range; it waits for the device to do so. OTPO_KERNELS_DEBUG=1 sets it."""


class Routing(NamedTuple):
    """A stable grouping of slots by expert, on the device.

    Attributes:
        destinations: `(T, K)` int32, each slot's row in the order of experts; -1 for a slot that goes nowhere.
        offsets: `(E,)` int32, the row after each group's last, padding included, as grouped products take it.
        counts: `(E,)` int32, the slots of each group, padding left out.
        rows: R, the rows to reserve. It follows from shapes alone, so that the host need not know the counts; rows
            from `offsets[-1]` on belong to no group.
    """

    destinations: Tensor
    offsets: Tensor
    counts: Tensor
    rows: int


def route(top_k_index: Tensor, num_experts: int, *, alignment: int = 1) -> Routing:
    """Groups the slots of all tokens by expert; within a group they keep their order.

    An index outside `[0, num_experts)` drops its slot. Expert parallelism uses `num_experts` for an expert that
    another process holds; any other such index is a mistake, which `OTPO_KERNELS_DEBUG=1` turns into an error.

    Args:
        top_k_index: `(T, K)` int32 or int64, the experts of each token.
        num_experts: E, at least 1.
        alignment: Each group begins at a multiple of this and is padded to one, as some products need it.

    Raises:
        ValueError: A shape, a dtype or an option is outside what is stated.
        IndexError: In debug mode, for an index that is neither an expert nor `num_experts`.
    """
    if top_k_index.dim() != 2 or top_k_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "`top_k_index` must be int32 or int64 of shape (tokens, slots), "
            f"got {top_k_index.dtype} of shape {tuple(top_k_index.shape)}."
        )
    _check_options(num_experts, alignment)
    if DEBUG:
        _check_indices(top_k_index, num_experts)
    tokens, slots = top_k_index.shape
    destinations, offsets, counts = _route(top_k_index, num_experts, alignment)
    return Routing(destinations, offsets, counts, reserved_rows(tokens * slots, num_experts, alignment))


def route_by_counts(counts: Tensor, rows: int, *, alignment: int = 1) -> Routing:
    """Groups rows that come in chunks, source after source and within a source expert after expert, by expert.

    Within a group, rows stand in the order of their sources. This is the move after the all-to-all of expert
    parallelism; `unpermute` is the way back.

    Args:
        counts: `(S, E)` int32 or int64, rows of each chunk, on the device.
        rows: Rows of the tensor to move. Those past the sum of `counts` go nowhere.
        alignment: See [`route`].

    Raises:
        ValueError: A shape, a dtype or an option is outside what is stated.
    """
    if counts.dim() != 2 or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "`counts` must be int32 or int64 of shape (sources, experts), "
            f"got {counts.dtype} of shape {tuple(counts.shape)}."
        )
    _check_options(counts.size(1), alignment)
    destinations, offsets, totals = _route_by_counts(counts, rows, alignment)
    return Routing(destinations, offsets, totals, reserved_rows(rows, counts.size(1), alignment))


def reserved_rows(slots: int, num_experts: int, alignment: int) -> int:
    """The most rows that `slots` in `num_experts` groups can take, each group padded to `alignment`."""
    if alignment == 1:
        return slots
    return (slots + min(slots, num_experts) * (alignment - 1)) // alignment * alignment


def route_reference(top_k_index: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels compute, in plain torch by a stable sort."""
    index = top_k_index.flatten().long()
    index = torch.where((index >= 0) & (index < num_experts), index, num_experts)
    counts = index.new_zeros(num_experts + 1).scatter_add_(0, index, torch.ones_like(index))[:-1]
    padded = -(-counts // alignment) * alignment
    offsets = padded.cumsum(0)
    padding_before = offsets - padded - (counts.cumsum(0) - counts)
    order = index.argsort(stable=True)
    places = torch.arange(len(index), device=index.device)
    destinations = torch.empty_like(index)
    destinations[order] = places + torch.cat([padding_before, padding_before.new_zeros(1)])[index[order]]
    destinations = torch.where(index < num_experts, destinations, -1)
    return destinations.view_as(top_k_index).int(), offsets.int(), counts.int()


def route_by_counts_reference(counts: Tensor, rows: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, in plain torch."""
    counts = counts.long()
    totals = counts.sum(0)
    padded = -(-totals // alignment) * alignment
    offsets = padded.cumsum(0)
    ends = counts.flatten().cumsum(0)
    begins = ends.view_as(counts) - counts
    shift = (offsets - padded + counts.cumsum(0) - counts - begins).flatten()
    row = torch.arange(rows, device=counts.device)
    chunk = torch.searchsorted(ends, row, right=True)
    destinations = torch.where(row < ends[-1:], row + shift[chunk.clamp(max=len(ends) - 1)], -1)
    return destinations[:, None].int(), offsets.int(), totals.int()


def _check_options(num_experts: int, alignment: int) -> None:
    if num_experts < 1:
        raise ValueError(f"`num_experts` must be at least 1, got {num_experts}.")
    if alignment < 1:
        raise ValueError(f"`alignment` must be at least 1, got {alignment}; 1 pads nothing.")


def _check_indices(top_k_index: Tensor, num_experts: int) -> None:
    wrong = (top_k_index < 0) | (top_k_index > num_experts)
    if wrong.any():
        token, slot = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"`top_k_index[{token}, {slot}]` is {int(top_k_index[token, slot])}, of {num_experts} experts; an index "
            f"must be in [0, {num_experts}), or {num_experts} for an expert that another process holds."
        )


@torch.library.custom_op("otpo::route", mutates_args=())
def _route(top_k_index: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_in_triton(top_k_index):
        return route_reference(top_k_index, num_experts, alignment)
    from . import routing_kernels

    return routing_kernels.route(top_k_index, num_experts, alignment)


@_route.register_fake
def _(top_k_index: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = top_k_index.new_empty(num_experts, dtype=torch.int32)
    return top_k_index.new_empty(top_k_index.shape, dtype=torch.int32), groups, torch.empty_like(groups)


@torch.library.custom_op("otpo::route_by_counts", mutates_args=())
def _route_by_counts(counts: Tensor, rows: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_in_triton(counts):
        return route_by_counts_reference(counts, rows, alignment)
    from . import routing_kernels

    return routing_kernels.route_by_counts(counts, rows, alignment)


@_route_by_counts.register_fake
def _(counts: Tensor, rows: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = counts.new_empty(counts.size(1), dtype=torch.int32)
    return counts.new_empty((rows, 1), dtype=torch.int32), groups, torch.empty_like(groups)
