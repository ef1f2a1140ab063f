"""The moves of the memcpy operator in Triton, token-major.

Shapes: T tokens, K slots of a token, H hidden size, E experts, R rows in the order of experts.

A program takes whole tiles of `ROWS` tokens by `BLOCK` columns: what belongs to a token is read once, and each of its
K rows is written or read once, 16 bytes a thread where H allows it. Bytes, in rows of H: `permute` T + R, `unpermute`
R + T, the weighted backward T + 2 R.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import INTERPRETED

_TAIL = 2 if INTERPRETED else 128  # programs that share the rows after the last group


def _tiles() -> list[triton.Config]:
    if INTERPRETED:
        return [triton.Config({"ROWS": 8, "BLOCK": 32})]
    # The best of some thirty on an H100 at five shapes of models, within 1% of each other.
    sizes = ((1, 1024, 4), (1, 2048, 8), (4, 512, 8))
    return [triton.Config({"ROWS": rows, "BLOCK": block}, num_warps=warps) for rows, block, warps in sizes]


def _tuned(*key: str) -> Callable[[Any], Any]:
    """Picks tiles in the first call of each key, which waits for the device; what it finds is kept on disk."""

    def bench(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    return triton.autotune(_tiles(), key=list(key), do_bench=bench, cache_results=True)


@triton.jit
def _zero_gaps(out_ptr, offsets_ptr, counts_ptr, program, rows, experts, hidden, TAIL: tl.constexpr):
    """Zeroes the padding of one group (programs below E) or a share of the rows after the last one."""
    in_group = program < experts
    group = tl.where(in_group, program, experts - 1)
    count = tl.load(counts_ptr + group)
    group_end = tl.load(offsets_ptr + group)
    group_begin = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    begin = tl.where(in_group, group_begin + count, group_end + program - experts)
    end = tl.where(in_group, group_end, rows)
    step = tl.where(in_group, 1, TAIL)
    lanes = tl.arange(0, 256)
    for row in range(begin.to(tl.int64), end, step):
        for first in range(0, hidden, 256):
            column = first + lanes
            zeros = tl.zeros([256], out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * hidden + column, zeros, mask=column < hidden)


@_tuned("hidden", "K")
@triton.jit(do_not_specialize=["tokens", "rows"])
def _permute_kernel(
    x_ptr,
    out_ptr,
    destinations_ptr,
    offsets_ptr,
    counts_ptr,
    tokens,
    rows,
    experts,
    hidden,
    x_stride,
    K: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(hidden, BLOCK)
    tiles = tl.cdiv(tokens, ROWS) * blocks
    if program < tiles:
        token = program // blocks * ROWS + tl.arange(0, ROWS)
        column = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (token < tokens)[:, None] & (column < hidden)
        x = tl.load(x_ptr + token[:, None].to(tl.int64) * x_stride + column, mask=inside)
        for slot in tl.static_range(K):
            row = tl.load(destinations_ptr + token * K + slot, mask=token < tokens, other=-1)[:, None]
            tl.store(out_ptr + row.to(tl.int64) * hidden + column, x, mask=inside & (row >= 0))
    else:
        _zero_gaps(out_ptr, offsets_ptr, counts_ptr, program - tiles, rows, experts, hidden, TAIL)


@_tuned("hidden", "K", "WEIGHTED")
@triton.jit(do_not_specialize=["tokens"])
def _unpermute_kernel(
    rows_ptr,
    out_ptr,
    destinations_ptr,
    weights_ptr,
    tokens,
    hidden,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(hidden, BLOCK)
    token = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens)[:, None] & (column < hidden)
    total = tl.zeros([ROWS, BLOCK], ACCUMULATE)
    for slot in tl.static_range(K):
        row = tl.load(destinations_ptr + token * K + slot, mask=token < tokens, other=-1)
        at = row[:, None].to(tl.int64) * hidden + column
        y = tl.load(rows_ptr + at, mask=inside & (row >= 0)[:, None], other=0.0)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * K + slot, mask=row >= 0, other=0.0)
            total += y.to(ACCUMULATE) * weight[:, None].to(ACCUMULATE)
        else:
            total += y.to(ACCUMULATE)
    out = out_ptr + token[:, None].to(tl.int64) * hidden + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _unpermute_backward_kernel(
    grad_ptr,
    rows_ptr,
    weights_ptr,
    destinations_ptr,
    offsets_ptr,
    counts_ptr,
    grad_rows_ptr,
    grad_weights_ptr,
    tokens,
    rows,
    experts,
    hidden,
    grad_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    if token < tokens:
        slot = tl.arange(0, SLOTS)
        row = tl.load(destinations_ptr + token * K + slot, mask=slot < K, other=-1)
        weight = tl.load(weights_ptr + token * K + slot, mask=slot < K, other=0.0).to(ACCUMULATE)[:, None]
        begin = row[:, None].to(tl.int64) * hidden
        dot = tl.zeros([SLOTS], ACCUMULATE)
        for first in range(0, hidden, BLOCK):
            column = first + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + token.to(tl.int64) * grad_stride + column, mask=column < hidden, other=0.0)
            grad = grad.to(ACCUMULATE)[None, :]
            at = begin + column[None, :]
            inside = (row >= 0)[:, None] & (column < hidden)[None, :]
            y = tl.load(rows_ptr + at, mask=inside, other=0.0).to(ACCUMULATE)
            tl.store(grad_rows_ptr + at, (weight * grad).to(grad_rows_ptr.dtype.element_ty), mask=inside)
            dot += tl.sum(y * grad, 1)
        if grad_weights_ptr.dtype.element_ty != tl.float64:
            dot = dot.to(tl.float32)  # Triton's interpreter makes no bfloat16 of float64
        tl.store(grad_weights_ptr + token * K + slot, dot.to(grad_weights_ptr.dtype.element_ty), mask=slot < K)
    else:
        _zero_gaps(grad_rows_ptr, offsets_ptr, counts_ptr, token - tokens, rows, experts, hidden, TAIL)


def permute(x: Tensor, destinations: Tensor, offsets: Tensor, counts: Tensor, rows: int) -> Tensor:
    """`memcpy.permute` on tensors."""
    x = _rows_contiguous(x)
    tokens, hidden = x.shape
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    experts = len(offsets)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(tokens, meta["ROWS"]) * triton.cdiv(hidden, meta["BLOCK"]) + experts + _TAIL,)

    with torch.cuda.device_of(x):
        _permute_kernel[grid](
            x,
            out,
            destinations,
            offsets,
            counts,
            tokens,
            rows,
            experts,
            hidden,
            x.stride(0),
            K=destinations.size(1),
            TAIL=_TAIL,
        )
    return out


def unpermute(rows: Tensor, destinations: Tensor, weights: Tensor | None) -> Tensor:
    """`memcpy.unpermute` on tensors."""
    rows = rows.contiguous()
    tokens, slots = destinations.shape
    hidden = rows.size(1)
    out = torch.empty(tokens, hidden, dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(tokens, meta["ROWS"]) * triton.cdiv(hidden, meta["BLOCK"]),)

    with torch.cuda.device_of(rows):
        _unpermute_kernel[grid](
            rows,
            out,
            destinations,
            rows if weights is None else weights.contiguous(),
            tokens,
            hidden,
            K=slots,
            WEIGHTED=weights is not None,
            ACCUMULATE=type_of_sums(rows),
        )
    return out


def unpermute_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, destinations: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `memcpy.unpermute` by its rows and by its weights."""
    grad, rows, weights = _rows_contiguous(grad), rows.contiguous(), weights.contiguous()
    tokens, slots = destinations.shape
    hidden, experts = rows.size(1), len(offsets)
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if rows.numel() == 0:
        return grad_rows, grad_weights.zero_()
    padded_slots = triton.next_power_of_2(slots)
    with torch.cuda.device_of(rows):
        _unpermute_backward_kernel[(tokens + experts + _TAIL,)](
            grad,
            rows,
            weights,
            destinations,
            offsets,
            counts,
            grad_rows,
            grad_weights,
            tokens,
            rows.size(0),
            experts,
            hidden,
            grad.stride(0),
            K=slots,
            SLOTS=padded_slots,
            ACCUMULATE=type_of_sums(rows),
            TAIL=_TAIL,
            **_backward_tile(hidden, padded_slots),
        )
    return grad_rows, grad_weights


def _backward_tile(hidden: int, slots: int) -> dict[str, int]:
    """Follows from shapes alone, tuned in no process: the order of the sums of weights' gradients hangs on it."""
    if INTERPRETED:
        return {"BLOCK": 32}
    return {"BLOCK": max(64, min(triton.next_power_of_2(hidden), 16384 // slots)), "num_warps": 8}


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def type_of_sums(rows: Tensor) -> tl.dtype:
    """What kernels compute in: float32, or float64 for rows of it."""
    return tl.float64 if rows.dtype == torch.float64 else tl.float32
