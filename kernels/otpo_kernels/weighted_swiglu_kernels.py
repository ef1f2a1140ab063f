"""SwiGLU of rows times their routers' weights, its gradients, and the slot that each row came from, in Triton.

Shapes: R rows in the order of experts, F the experts' width, N slots. `[gate, up]` stand side by side in rows of 2 F,
as transformers' `gate_up_proj` makes them.

Bytes, in rows of F: `weighted_swiglu` 2 + 1, `weighted_swiglu_backward` 3 + 2, or 3 + 3 where it computes the value
once more. Eager torch moves 13 for the gradients without the weights.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import INTERPRETED
from .memcpy_kernels import type_of_sums
from .swiglu_kernels import TILE, swiglu_gradient, swiglu_of

_SLOTS = 64 if INTERPRETED else 1024  # that a program inverts


@triton.jit(do_not_specialize=["slots"])
def _sources_kernel(destinations_ptr, sources_ptr, slots, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(destinations_ptr + slot, mask=slot < slots, other=-1)
    tl.store(sources_ptr + row, slot, mask=row >= 0)


@triton.jit(do_not_specialize=["rows"])
def _weighted_swiglu_kernel(
    h_ptr,
    weights_ptr,
    sources_ptr,
    a_ptr,
    rows,
    width,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    source = tl.load(sources_ptr + row, mask=row < rows, other=-1)
    weight = tl.load(weights_ptr + source, mask=source >= 0, other=0.0).to(SUMS)[:, None]
    # Rows that come from no slot count as zeros and are stored as such: products of a later pass meet them.
    stored = (row < rows)[:, None] & (column < width)
    inside = stored & (source >= 0)[:, None]
    begin = row[:, None].to(tl.int64) * width
    gate = tl.load(h_ptr + 2 * begin + column, mask=inside, other=0.0).to(SUMS)
    up = tl.load(h_ptr + 2 * begin + width + column, mask=inside, other=0.0).to(SUMS)
    tl.store(a_ptr + begin + column, (weight * swiglu_of(gate, up)).to(a_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows"])
def _weighted_swiglu_backward_kernel(
    grad_ptr,
    h_ptr,
    weights_ptr,
    sources_ptr,
    grad_h_ptr,
    grad_weights_ptr,
    value_ptr,
    rows,
    width,
    VALUE: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has whole rows, for the sums that are the weights' gradients."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(sources_ptr + row, mask=row < rows, other=-1)
    taken = source >= 0
    weight = tl.load(weights_ptr + source, mask=taken, other=0.0).to(SUMS)[:, None]
    begin = row[:, None].to(tl.int64) * width
    dot = tl.zeros([ROWS], SUMS)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        stored = (row < rows)[:, None] & (column < width)
        inside = stored & taken[:, None]
        at = begin + column
        of_gate = 2 * begin + column
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(SUMS)
        gate = tl.load(h_ptr + of_gate, mask=inside, other=0.0).to(SUMS)
        up = tl.load(h_ptr + of_gate + width, mask=inside, other=0.0).to(SUMS)
        activated, grad_gate, grad_up = swiglu_gradient(grad, gate, up)
        dot += tl.sum(activated * grad, 1)
        tl.store(grad_h_ptr + of_gate, (weight * grad_gate).to(grad_h_ptr.dtype.element_ty), mask=stored)
        tl.store(grad_h_ptr + of_gate + width, (weight * grad_up).to(grad_h_ptr.dtype.element_ty), mask=stored)
        if VALUE:
            tl.store(value_ptr + at, (weight * activated).to(value_ptr.dtype.element_ty), mask=stored)
    if grad_weights_ptr.dtype.element_ty != tl.float64:
        dot = dot.to(tl.float32)  # Triton's interpreter makes no bfloat16 of float64
    tl.store(grad_weights_ptr + source, dot.to(grad_weights_ptr.dtype.element_ty), mask=taken)


def sources_of_rows(destinations: Tensor, rows: int) -> Tensor:
    """`weighted_swiglu.sources_of_rows` on tensors."""
    sources = torch.full((rows,), -1, dtype=torch.int32, device=destinations.device)
    slots = destinations.numel()
    if slots:
        with torch.cuda.device_of(destinations):
            _sources_kernel[(triton.cdiv(slots, _SLOTS),)](destinations.contiguous(), sources, slots, BLOCK=_SLOTS)
    return sources


def weighted_swiglu(h: Tensor, weights: Tensor, sources: Tensor) -> Tensor:
    """`weighted_swiglu.weighted_swiglu_reference` on tensors."""
    rows, width = len(h), h.size(1) // 2
    a = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    if a.numel():
        grid = (triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(width, TILE["BLOCK"]),)
        with torch.cuda.device_of(h):
            _weighted_swiglu_kernel[grid](
                h.contiguous(), weights.contiguous(), sources, a, rows, width, SUMS=type_of_sums(h), **TILE
            )
    return a


def weighted_swiglu_backward(
    grad: Tensor, h: Tensor, weights: Tensor, sources: Tensor, *, value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_swiglu.weighted_swiglu_backward_reference` on tensors, and the value, empty where `value` is False."""
    rows, width = grad.shape
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=h.device)  # of dropped slots too
    a = torch.empty(rows if value else 0, width, dtype=h.dtype, device=h.device)
    if grad.numel():
        with torch.cuda.device_of(h):
            _weighted_swiglu_backward_kernel[(triton.cdiv(rows, TILE["ROWS"]),)](
                grad.contiguous(), h.contiguous(), weights.contiguous(), sources, grad_h, grad_weights, a, rows, width,
                VALUE=value, SUMS=type_of_sums(h), **TILE,
            )  # fmt: skip
    return grad_h, grad_weights, a
