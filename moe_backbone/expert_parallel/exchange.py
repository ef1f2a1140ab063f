"""The trip of a token row to the process that holds its expert and back, for DeepSpeed's layer and transformers' own.

Shapes: T tokens of this process, K slots of a token, R = T * K rows that it sends, N rows that it receives, W
processes that share the experts, E experts, e = E / W experts of each process, D hidden size. A tensor's suffix is its
shape.

Process p holds the experts from `p * e` on. So rows that stand by expert stand by process too, and a process sends
each other process one block of them. What arrives stands by the process that sent it, and within that by expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from otpo_kernels.memcpy import permute, reorder, route, unpermute


class ExpertGroup(NamedTuple):
    """The processes that share the experts, this one among them.

    Attributes:
        group: torch's process group; not read where W is 1.
        processes: W.
        local_experts: e.
    """

    group: dist.ProcessGroup | None
    processes: int
    local_experts: int


class Splits(NamedTuple):
    """How many rows each process of the group sends to this one and receives from it.

    Attributes:
        arrived_We: `(W, e)` int32 on the device, the rows that each process sends to each expert here.
        sent: W numbers on the host, the rows that this process sends to each; their sum is R.
        received: W numbers on the host, the rows that this process receives from each; their sum is N.
    """

    arrived_We: Tensor
    sent: list[int]
    received: list[int]


def run_spread_experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertGroup,
    run_arrived: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Weighted sum over a token's experts, wherever they are; all processes of the group call it together.

    Args:
        x_TD: Hidden states `(T, D)`; T may differ between processes, and be zero.
        index_TK: Experts of each token `(T, K)`, in `[0, E)`.
        weights_TK: `(T, K)`, the router's weights, applied where the token is.
        experts: Who holds them.
        run_arrived: Runs the experts of this process: from the rows that arrived `(N, D)` and `arrived_We` `(W, e)` to
            the results `(N, D)` in the same order. N may be zero.

    Returns:
        `(T, D)` in the dtype of what `run_arrived` returns. Gradients flow to `x_TD`, to `weights_TK` and, in each
        process, to the experts that it holds.
    """
    # Each token's row is copied K times, so that the rows of an expert, and so of a process, stand together.
    with record_function("otpo::memcpy"):
        routing = route(index_TK, experts.processes * experts.local_experts)
        x_RD = permute(x_TD, routing)

    # The rows visit the processes of their experts; one process alone has all of them already.
    if experts.processes == 1:
        y_RD = run_arrived(x_RD, routing.counts[None])
    else:
        with record_function("otpo::all_to_all"):
            splits = exchange_counts(routing.counts, experts)
            x_ND = exchange_rows(x_RD, splits.sent, splits.received, experts.group)
        y_ND = run_arrived(x_ND, splits.arrived_We)
        with record_function("otpo::all_to_all"):
            y_RD = exchange_rows(y_ND, splits.received, splits.sent, experts.group)

    # The K results of a token, back in the order in which they left, become its weighted sum.
    with record_function("otpo::memcpy"):
        return unpermute(y_RD, routing, weights_TK)


def run_by_expert(x_ND: Tensor, arrived_We: Tensor, products: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A `run_arrived` of [`run_spread_experts`] for experts that take their rows grouped by expert.

    Args:
        x_ND: Rows by process, and within that by expert `(N, D)`.
        arrived_We: Rows of each process for each expert here `(W, e)`.
        products: From rows grouped by expert `(N, D)` and the ends of the groups `(e,)` int32 to results `(N, D)`.

    Returns:
        `(N, D)` in the order of `x_ND`.
    """
    if len(arrived_We) == 1:  # the rows of one process are grouped by expert as they are
        return products(x_ND, arrived_We[0].cumsum(0, dtype=torch.int32))
    with record_function("otpo::memcpy"):
        x_ND, local = reorder(x_ND, arrived_We)
    y_ND = products(x_ND, local.offsets)
    with record_function("otpo::memcpy"):
        return unpermute(y_ND, local)


def exchange_counts(counts_E: Tensor, experts: ExpertGroup) -> Splits:
    """Tells each process of the group how many rows this one has for its experts; the trip's one wait for the host.

    Args:
        counts_E: Rows of this process for each expert of the group `(E,)`, on the device.
        experts: Who holds them.
    """
    sent_We = counts_E.view(experts.processes, experts.local_experts)
    arrived_We = torch.empty_like(sent_We)
    dist.all_to_all_single(arrived_We, sent_We, group=experts.group)
    sent, received = torch.stack([sent_We.sum(1), arrived_We.sum(1)]).tolist()
    return Splits(arrived_We, sent, received)


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sends each process of the group its block of rows, and returns the blocks of all that arrive, in their order.

    Differentiable: the backward pass sends each row's gradient the way that the row came.

    Args:
        rows: `(sum(sent), D)`, by the process that each goes to.
        sent: Rows for each process.
        received: Rows from each process.
        group: torch's process group.

    Returns:
        `(sum(received), D)`, by the process that each came from.
    """
    exchanged: Any = _ExchangeRows.apply(rows, sent, received, group)
    return exchanged


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.size(1))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
