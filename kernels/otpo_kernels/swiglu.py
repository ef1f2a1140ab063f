"""SwiGLU of rows grouped by expert, `silu(gate) * up`, and its gradient in one pass each.

Shapes: R rows in the order of experts, E experts, F their width. `[gate, up]` stand side by side in rows of 2 F, as
transformers' `gate_up_proj` makes them.

torch's compiler fuses the forward as well; its kernel of the gradient, which joins both halves, took 1.8 times as
long as its bytes do at a copy's rate (65,536 rows of 1536, one H200). So SwiGLU is an operator in compiled layers
too, where grouped products come before and after it. What it can be fused with are routers' weights, in
[`otpo_kernels.weighted_swiglu`].
"""

from typing import Any

import torch
from torch import Tensor

from .backend import runs_in_triton


def swiglu(h: Tensor, ends: Tensor) -> Tensor:
    """`silu(gate) * up` of the halves of rows, computed in float32 at least.

    Gradients of gradients and forward-mode derivatives are not covered.

    Args:
        h: `(R, 2 F)`, of any floating dtype.
        ends: `(E,)`, the row after each group's last, on the device of `h`.

    Returns:
        `(R, F)` in the dtype of `h`. Rows from `ends[-1]` on are zero, and so is their gradient, whatever `h` holds
        there.

    Raises:
        ValueError: `h` does not have two halves, or `ends` no group, or they are on different devices.
    """
    if h.dim() != 2 or h.size(1) % 2 or ends.dim() != 1 or not ends.numel() or h.device != ends.device:
        raise ValueError(
            "`h` must have shape (R, 2 F) and `ends` (E,) with an expert at least, on one device, got "
            f"{tuple(h.shape)} on {h.device} and {tuple(ends.shape)} on {ends.device}."
        )
    return _swiglu(h, ends)


def swiglu_reference(h: Tensor, ends: Tensor) -> Tensor:
    """What the kernel computes, in plain torch; it reads the last end, which no kernel does."""
    gate, up = _halves(h, ends)
    return _with_zeros((torch.nn.functional.silu(gate) * up).to(h.dtype), len(h))


def swiglu_backward_reference(grad: Tensor, h: Tensor, ends: Tensor) -> Tensor:
    """What the kernel computes, in plain torch; see [`swiglu_reference`]."""
    gate, up = _halves(h, ends)
    grad = grad[: len(gate)].to(gate.dtype)
    of_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return _with_zeros(torch.cat([of_gate, grad * torch.nn.functional.silu(gate)], 1).to(h.dtype), len(h))


def _halves(h: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up projection of the rows that belong to a group, in float32 at least."""
    gate, up = h[: int(ends[-1])].to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)
    return gate, up


def _with_zeros(rows: Tensor, count: int) -> Tensor:
    """The rows, contiguous, and zeros up to so many."""
    if len(rows) == count:
        return rows.contiguous()
    whole = rows.new_zeros(count, rows.size(1))
    whole[: len(rows)] = rows
    return whole


@torch.library.custom_op("otpo::swiglu", mutates_args=())
def _swiglu(h: Tensor, ends: Tensor) -> Tensor:
    return run_swiglu(h, ends)


def run_swiglu(h: Tensor, ends: Tensor) -> Tensor:
    """[`swiglu`] without a gradient, for operators that have one of their own."""
    if not runs_in_triton(h):
        return swiglu_reference(h, ends)
    from . import swiglu_kernels

    return swiglu_kernels.swiglu(h, ends)


@_swiglu.register_fake
def _(h: Tensor, ends: Tensor) -> Tensor:
    return h.new_empty(h.size(0), h.size(1) // 2)


@torch.library.custom_op("otpo::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, h: Tensor, ends: Tensor) -> Tensor:
    if not runs_in_triton(h):
        return swiglu_backward_reference(grad, h, ends)
    from . import swiglu_kernels

    return swiglu_kernels.swiglu_backward(grad, h, ends)


@_swiglu_backward.register_fake
def _(grad: Tensor, h: Tensor, ends: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _swiglu_backward(grad, *ctx.saved_tensors), None


_swiglu.register_autograd(_gradients, setup_context=_save)
