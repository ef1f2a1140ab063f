"""SwiGLU of rows grouped by expert, and its gradient, in Triton.

Shapes: R rows in the order of experts, F the experts' width; `[gate, up]` stand side by side in rows of 2 F.

Bytes, in rows of F: `swiglu` 2 + 1, `swiglu_backward` 3 + 2. Eager torch moves 5 and 13 for the same.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import INTERPRETED
from .memcpy_kernels import type_of_sums

TILE = {"ROWS": 4, "BLOCK": 16} if INTERPRETED else {"ROWS": 8, "BLOCK": 256, "num_warps": 4}
"""Rows and columns of SwiGLU that a program takes at once."""


@triton.jit
def swiglu_of(gate, up):
    """In the type of its arguments."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_gradient(grad, gate, up):
    """SwiGLU, and what `grad` makes of the gate and of the up projection, in the type of its arguments."""
    chance = tl.sigmoid(gate)
    activated = gate * chance
    return activated * up, grad * up * (chance + activated * (1.0 - chance)), grad * activated


@triton.jit
def _tile(ends_ptr, rows, experts, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's elements: where its rows begin, its columns, which are there, and which belong to a group."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = (row < rows)[:, None] & (column < width)
    taken = here & (row < tl.load(ends_ptr + experts - 1))[:, None]
    return row[:, None].to(tl.int64) * width, column, here, taken


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    h_ptr, a_ptr, ends_ptr, rows, experts, width, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    begin, column, here, taken = _tile(ends_ptr, rows, experts, width, ROWS, BLOCK)
    gate = tl.load(h_ptr + 2 * begin + column, mask=taken, other=0.0).to(SUMS)
    up = tl.load(h_ptr + 2 * begin + width + column, mask=taken, other=0.0).to(SUMS)
    tl.store(a_ptr + begin + column, swiglu_of(gate, up).to(a_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward_kernel(
    grad_ptr,
    h_ptr,
    grad_h_ptr,
    ends_ptr,
    rows,
    experts,
    width,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, column, here, taken = _tile(ends_ptr, rows, experts, width, ROWS, BLOCK)
    of_gate = 2 * begin + column
    grad = tl.load(grad_ptr + begin + column, mask=taken, other=0.0).to(SUMS)
    gate = tl.load(h_ptr + of_gate, mask=taken, other=0.0).to(SUMS)
    up = tl.load(h_ptr + of_gate + width, mask=taken, other=0.0).to(SUMS)
    _, grad_gate, grad_up = swiglu_gradient(grad, gate, up)
    tl.store(grad_h_ptr + of_gate, grad_gate.to(grad_h_ptr.dtype.element_ty), mask=here)
    tl.store(grad_h_ptr + of_gate + width, grad_up.to(grad_h_ptr.dtype.element_ty), mask=here)


def swiglu(h: Tensor, ends: Tensor) -> Tensor:
    """`swiglu.swiglu_reference` on tensors."""
    a = torch.empty(len(h), h.size(1) // 2, dtype=h.dtype, device=h.device)
    _launch(_swiglu_kernel, (h.contiguous(), a), ends, a)
    return a


def swiglu_backward(grad: Tensor, h: Tensor, ends: Tensor) -> Tensor:
    """`swiglu.swiglu_backward_reference` on tensors."""
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    _launch(_swiglu_backward_kernel, (grad.contiguous(), h.contiguous(), grad_h), ends, grad)
    return grad_h


def _launch(kernel: Any, tensors: tuple[Tensor, ...], ends: Tensor, shaped: Tensor) -> None:
    """Runs a kernel over all tiles of `shaped`, `(R, F)`."""
    rows, width = shaped.shape
    if not shaped.numel():
        return
    grid = (triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(width, TILE["BLOCK"]),)
    with torch.cuda.device_of(shaped):
        kernel[grid](*tensors, ends.contiguous(), rows, len(ends), width, SUMS=type_of_sums(shaped), **TILE)
