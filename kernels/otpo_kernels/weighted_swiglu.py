"""SwiGLU of rows grouped by expert, times the weights that routers gave them, and its gradients in one pass each.

Shapes: T tokens, K slots of a token, R rows in the order of experts, F their width. `[gate, up]` stand side by side in
rows of 2 F, as transformers' `gate_up_proj` makes them.

A product after SwiGLU is linear, so a row's weight may be a factor before it as well as after it: with weights w and
the product's matrix W, `w (a W) = (w a) W`. Before it, the sum over a token's slots needs no weights, its backward is
a plain gather, and a weight's gradient is a sum over what SwiGLU's gradient reads anyway. No output of an expert is
then kept for the backward, and none is read in it (arXiv 2512.14080 computes the gradient of weights so).
"""

from typing import Any

import torch
from torch import Tensor

from .backend import runs_in_triton
from .routing import Routing


def weighted_swiglu(h: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`w * silu(gate) * up` of the halves of rows and of each row's weight, computed in float32 at least.

    Gradients of gradients and forward-mode derivatives are not covered.

    Args:
        h: `(R, 2 F)`, of any floating dtype.
        weights: `(T, K)`, of any floating dtype; one for each slot. Their gradient is zero at dropped slots.
        routing: Where each slot's row is.

    Returns:
        `(R, F)` in the dtype of `h`. Rows that come from no slot are zero, and so is their gradient, whatever `h`
        holds there.

    Raises:
        ValueError: A shape does not fit `routing`, or tensors are on different devices.
    """
    if h.dim() != 2 or h.size(1) % 2 or h.size(0) != routing.rows or weights.shape != routing.destinations.shape:
        raise ValueError(
            f"`h` must have shape ({routing.rows}, 2 F) and `weights` {tuple(routing.destinations.shape)}, one for "
            f"each slot, got {tuple(h.shape)} and {tuple(weights.shape)}."
        )
    if not h.device == weights.device == routing.destinations.device:
        raise ValueError(
            f"`h`, `weights` and `routing` must be on one device, got {h.device}, {weights.device} and "
            f"{routing.destinations.device}."
        )
    return _weighted_swiglu(h, weights, _sources_of_rows(routing.destinations, routing.rows))


def weighted_swiglu_reference(h: Tensor, weights: Tensor, sources: Tensor) -> Tensor:
    """What the kernel computes, in plain torch.

    Args:
        h: `(R, 2 F)`.
        weights: `(T, K)`.
        sources: `(R,)`, each row's slot; -1 for none.

    Returns:
        `(R, F)`.
    """
    gate, up, weight = _factors(h, weights, sources)
    return (torch.nn.functional.silu(gate) * up * weight).to(h.dtype).contiguous()


def weighted_swiglu_backward_reference(
    grad: Tensor, h: Tensor, weights: Tensor, sources: Tensor
) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in plain torch.

    Args:
        grad: `(R, F)`.
        h: As in [`weighted_swiglu_reference`], and so are the others.
        weights: Of slots.
        sources: Of rows.

    Returns:
        The gradients of `h` and of `weights`, in their shapes and dtypes.
    """
    gate, up, weight = _factors(h, weights, sources)
    grad = _taken(grad, sources).to(gate.dtype)
    activated, weighted = torch.nn.functional.silu(gate), grad * weight
    of_gate = torch.ops.aten.silu_backward(weighted * up, gate)
    grad_h = torch.cat([of_gate, weighted * activated], 1).to(h.dtype).contiguous()
    grad_weights = weights.new_zeros(weights.numel() + 1)  # rows of no slot land in the last place
    of_rows = torch.linalg.vecdot(activated * up, grad).to(weights.dtype)
    grad_weights[torch.where(sources < 0, weights.numel(), sources).long()] = of_rows
    return grad_h, grad_weights[:-1].view(weights.shape).clone()


def _factors(h: Tensor, weights: Tensor, sources: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up projection of each row, and its weight `(R, 1)`, in float32 at least; 0 for rows of no slot."""
    sums = torch.promote_types(h.dtype, torch.float32)
    gate, up = _taken(h, sources).to(sums).chunk(2, dim=-1)
    padded = torch.cat([weights.flatten(), weights.new_zeros(1)]).to(sums)
    return gate, up, padded[sources.long()][:, None]


def _taken(rows: Tensor, sources: Tensor) -> Tensor:
    """The rows, and zeros for those of no slot; it reads which, as no kernel does."""
    taken = sources >= 0
    return rows if taken.all() else rows.where(taken[:, None], 0.0)


def sources_of_rows(destinations: Tensor, rows: int) -> Tensor:
    """The slot that each row of a routing comes from: `(R,)` int32, -1 for a row that comes from none."""
    if runs_in_triton(destinations):
        from . import weighted_swiglu_kernels

        return weighted_swiglu_kernels.sources_of_rows(destinations, rows)
    sources = torch.full((rows + 1,), -1, dtype=torch.int32, device=destinations.device)
    of_slot = destinations.flatten().long()
    places = torch.arange(len(of_slot), dtype=torch.int32, device=destinations.device)
    return sources.scatter_(0, of_slot.where(of_slot >= 0, rows), places)[:-1].clone()


def run_weighted_swiglu_backward(
    grad: Tensor, h: Tensor, weights: Tensor, sources: Tensor, *, value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of [`weighted_swiglu`], for operators that have one of their own.

    Args:
        grad: `(R, F)`.
        h: `(R, 2 F)`.
        weights: `(T, K)`.
        sources: Of [`sources_of_rows`].
        value: Whether the value is computed once more.

    Returns:
        The gradients of `h` and of `weights`, and the value, `(R, F)`, or nothing of it.
    """
    if runs_in_triton(h):
        from . import weighted_swiglu_kernels

        return weighted_swiglu_kernels.weighted_swiglu_backward(grad, h, weights, sources, value=value)
    a = weighted_swiglu_reference(h, weights, sources) if value else h.new_empty(0, grad.size(1))
    return *weighted_swiglu_backward_reference(grad, h, weights, sources), a


@torch.library.custom_op("otpo::sources_of_rows", mutates_args=())
def _sources_of_rows(destinations: Tensor, rows: int) -> Tensor:
    return sources_of_rows(destinations, rows)


@_sources_of_rows.register_fake
def _(destinations: Tensor, rows: int) -> Tensor:
    return destinations.new_empty(rows, dtype=torch.int32)


@torch.library.custom_op("otpo::weighted_swiglu", mutates_args=())
def _weighted_swiglu(h: Tensor, weights: Tensor, sources: Tensor) -> Tensor:
    if not runs_in_triton(h):
        return weighted_swiglu_reference(h, weights, sources)
    from . import weighted_swiglu_kernels

    return weighted_swiglu_kernels.weighted_swiglu(h, weights, sources)


@_weighted_swiglu.register_fake
def _(h: Tensor, weights: Tensor, sources: Tensor) -> Tensor:
    return h.new_empty(h.size(0), h.size(1) // 2)


@torch.library.custom_op("otpo::weighted_swiglu_backward", mutates_args=())
def _weighted_swiglu_backward(grad: Tensor, h: Tensor, weights: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    return run_weighted_swiglu_backward(grad, h, weights, sources, value=False)[:2]


@_weighted_swiglu_backward.register_fake
def _(grad: Tensor, h: Tensor, weights: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_weighted_swiglu_backward(grad, *ctx.saved_tensors), None


_weighted_swiglu.register_autograd(_gradients, setup_context=_save)
