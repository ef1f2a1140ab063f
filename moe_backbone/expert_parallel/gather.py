"""The other trip: every process gets all tokens, computes what its experts add to them, and the parts are summed.

Shapes: T tokens of this process, C tokens that each process reserves, W processes that share the experts, S = W * C
tokens of all, K slots of a token, e experts of each process, D hidden size. A tensor's suffix is its shape.

An all-to-all (`exchange`) sends T * K rows, most of them to others, and must tell the host how many come before it can
receive them: each layer waits for the device. A gather sends T rows to each other process, whatever was chosen, so
nothing waits, and nothing keeps a layer from being compiled whole. It moves fewer bytes where W <= K, and reserves
W * C * K rows, of which the grouped products compute those that are here. So it is taken for few processes. Where all
batches have one size, as packed rows do, C is known from the start; elsewhere processes agree on it (`capacity`).

The process groups of one engine are known here by a name, since a compiled graph holds no groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otpo_kernels.memcpy import permute, route, unpermute

_GROUPS: dict[str, dist.ProcessGroup] = {}

# torch 2.13 has new names for the same two calls.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gathering(NamedTuple):
    """Who gathers, and how much. All numbers are of the host, and the same in each step, but for C where batches vary.

    Attributes:
        group: Name of the process group, see [`remember_group`].
        processes: W.
        rank: Of this process in the group; it holds the experts from `rank * e` on.
        local_experts: e.
        capacity: C, the same in all processes.
    """

    group: str
    processes: int
    rank: int
    local_experts: int
    capacity: int


def remember_group(group: dist.ProcessGroup) -> str:
    """The name by which the operators here find a process group."""
    _GROUPS[group.group_name] = group
    return group.group_name


def gather_pays(processes: int, slots: int) -> bool:
    """Whether gathering all tokens moves no more bytes than sending each row to its expert.

    Args:
        processes: W, of one machine.
        slots: K.
    """
    return 1 < processes <= slots


def run_gathered_experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    gathering: Gathering,
    run_sorted: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Weighted sum over a token's experts, wherever they are; all processes of the group call it together.

    Args:
        x_TD: Hidden states `(T, D)`; T may differ between processes, up to C.
        index_TK: Experts of each token `(T, K)`, in `[0, W * e)`.
        weights_TK: `(T, K)`, the router's weights.
        gathering: Who holds the experts, and C.
        run_sorted: Runs the experts of this process: from rows grouped by expert and the ends of the groups `(e,)`
            int32 to results in the same order. Rows after the last group are to be left alone.

    Returns:
        `(T, D)` in the dtype of what `run_sorted` returns, summed over processes in it. Gradients flow as in
        [`exchange.run_spread_experts`].

    Raises:
        ValueError: T is above C.
    """
    group, processes, rank, local, capacity = gathering
    tokens = x_TD.size(0)
    if tokens > capacity:
        raise ValueError(
            f"A batch of {tokens} tokens, where each process reserves {capacity}: pretraining got more than "
            "`per_device_train_batch_size` rows of `sequence_length` tokens, or a layer got more than its model. Set "
            "`expert_exchange` to all_to_all."
        )
    # A token that makes up the number asks for an expert that nobody has.
    if tokens < capacity:
        missing = (0, 0, 0, capacity - tokens)
        x_TD, weights_TK = (nn.functional.pad(part, missing) for part in (x_TD, weights_TK))
        index_TK = nn.functional.pad(index_TK, missing, value=processes * local)

    x_SD, weights_SK, index_SK = _gather_tokens(x_TD, weights_TK, index_TK, group, processes)

    # Slots of other processes' experts go nowhere here, so each slot is computed once.
    index_SK = index_SK - rank * local
    index_SK = torch.where((index_SK >= 0) & (index_SK < local), index_SK, local)
    routing = route(index_SK, local)
    rows = run_sorted(permute(x_SD, routing), routing.offsets)
    return _scatter_rows(unpermute(rows, routing, weights_SK), group, processes)[:tokens]


# Operators, so that a compiled graph takes them as they are. All that is gathered is one operator's, since processes
# must call collectives in one order, and each compiles a graph of its own.


def _all_of(rows: Tensor, group: str, processes: int) -> Tensor:
    gathered = rows.new_empty(processes * rows.size(0), *rows.shape[1:])
    _gather(gathered, rows.contiguous(), group=_GROUPS[group])
    return gathered


def _mine_of(rows: Tensor, group: str, processes: int) -> Tensor:
    mine = rows.new_empty(rows.size(0) // processes, *rows.shape[1:])
    _scatter(mine, rows.contiguous(), group=_GROUPS[group])
    return mine


@torch.library.custom_op("otpo::gather_tokens", mutates_args=())
def _gather_tokens(
    x: Tensor, weights: Tensor, index: Tensor, group: str, processes: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _all_of(x, group, processes), _all_of(weights, group, processes), _all_of(index, group, processes)


@_gather_tokens.register_fake
def _(x: Tensor, weights: Tensor, index: Tensor, group: str, processes: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [(processes * part.size(0), *part.shape[1:]) for part in (x, weights, index)]
    return x.new_empty(sizes[0]), weights.new_empty(sizes[1]), index.new_empty(sizes[2])


@torch.library.custom_op("otpo::scatter_gradients", mutates_args=())
def _scatter_gradients(x: Tensor, weights: Tensor, group: str, processes: int) -> tuple[Tensor, Tensor]:
    return _mine_of(x, group, processes), _mine_of(weights, group, processes)


@_scatter_gradients.register_fake
def _(x: Tensor, weights: Tensor, group: str, processes: int) -> tuple[Tensor, Tensor]:
    sizes = [(part.size(0) // processes, *part.shape[1:]) for part in (x, weights)]
    return x.new_empty(sizes[0]), weights.new_empty(sizes[1])


@torch.library.custom_op("otpo::gather_rows", mutates_args=())
def _gather_rows(rows: Tensor, group: str, processes: int) -> Tensor:
    return _all_of(rows, group, processes)


@_gather_rows.register_fake
def _(rows: Tensor, group: str, processes: int) -> Tensor:
    return rows.new_empty(processes * rows.size(0), *rows.shape[1:])


@torch.library.custom_op("otpo::scatter_rows", mutates_args=())
def _scatter_rows(rows: Tensor, group: str, processes: int) -> Tensor:
    return _mine_of(rows, group, processes)


@_scatter_rows.register_fake
def _(rows: Tensor, group: str, processes: int) -> Tensor:
    return rows.new_empty(rows.size(0) // processes, *rows.shape[1:])


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, ctx.group, ctx.processes = inputs


def _gradients_of_tokens(ctx: Any, x: Tensor, weights: Tensor, _index: Any) -> tuple[Tensor | None, ...]:
    return *_scatter_gradients(x, weights, ctx.group, ctx.processes), None, None, None


def _gradients_of_rows(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_rows(rows, ctx.group, ctx.processes), None, None


_gather_tokens.register_autograd(_gradients_of_tokens, setup_context=_keep_group)
_scatter_rows.register_autograd(_gradients_of_rows, setup_context=_keep_group)
