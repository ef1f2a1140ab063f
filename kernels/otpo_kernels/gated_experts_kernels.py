"""The gradients of weighted SwiGLU rows, and the slot that each row came from, in Triton.

Shapes: R rows in the order of experts, F the experts' width, N slots. `[gate, up]` stand side by side in rows of 2 F,
as transformers' `gate_up_proj` makes them.

Bytes of `swiglu_backward`, in rows of F: 3 + 3. Eager torch moves 13 for the same without the weights.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import INTERPRETED
from .swiglu_kernels import swiglu_gradient

_SLOTS = 64 if INTERPRETED else 1024  # that a program inverts


@triton.jit(do_not_specialize=["slots"])
def _sources_kernel(destinations_ptr, sources_ptr, slots, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(destinations_ptr + slot, mask=slot < slots, other=-1)
    tl.store(sources_ptr + row, slot, mask=row >= 0)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward_kernel(
    grad_ptr,
    h_ptr,
    weights_ptr,
    sources_ptr,
    ends_ptr,
    grad_h_ptr,
    weighted_ptr,
    dots_ptr,
    rows,
    experts,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    taken = row < tl.load(ends_ptr + experts - 1)
    here = row < rows
    source = tl.load(sources_ptr + row, mask=taken, other=0)
    weight = tl.load(weights_ptr + source, mask=taken, other=0.0).to(tl.float32)[:, None]
    begin = row[:, None].to(tl.int64) * width
    dot = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        # Rows after the last group count as zeros and are stored as such: products of a later pass meet them.
        inside = taken[:, None] & (column < width)
        stored = here[:, None] & (column < width)
        at = begin + column
        of_gate = 2 * begin + column
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + of_gate, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + of_gate + width, mask=inside, other=0.0).to(tl.float32)
        activated, grad_gate, grad_up = swiglu_gradient(grad, gate, up)
        dot += tl.sum(activated * grad, 1)
        tl.store(grad_h_ptr + of_gate, (weight * grad_gate).to(grad_h_ptr.dtype.element_ty), mask=stored)
        tl.store(grad_h_ptr + of_gate + width, (weight * grad_up).to(grad_h_ptr.dtype.element_ty), mask=stored)
        tl.store(weighted_ptr + at, (weight * activated).to(weighted_ptr.dtype.element_ty), mask=stored)
    tl.store(dots_ptr + row, dot, mask=taken)


def sources_of_rows(destinations: Tensor, rows: int) -> Tensor:
    """`gated_experts.sources_of_rows` on tensors."""
    sources = torch.full((rows,), -1, dtype=torch.int32, device=destinations.device)
    slots = destinations.numel()
    if slots:
        with torch.cuda.device_of(destinations):
            _sources_kernel[(triton.cdiv(slots, _SLOTS),)](destinations, sources, slots, BLOCK=_SLOTS)
    return sources


def swiglu_backward(
    grad: Tensor, h: Tensor, weights: Tensor, sources: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_experts.swiglu_backward_reference`: rows after the last group's end are zero, their products aside."""
    rows, width = grad.shape
    grad_h, weighted = torch.empty_like(h), torch.empty_like(grad)
    dots = torch.empty(rows, dtype=torch.float32, device=h.device)
    if grad.numel():
        tile = {"ROWS": 4, "BLOCK": 16} if INTERPRETED else {"ROWS": 8, "BLOCK": 256, "num_warps": 4}
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        with torch.cuda.device_of(h):
            _swiglu_backward_kernel[grid](
                grad, h, weights, sources, ends, grad_h, weighted, dots, rows, len(ends), width, **tile
            )
    return grad_h, weighted, dots
