"""A step of AdamW on float32 masters, all weights in one launch and each in one pass, in Triton.

A launch for each weight takes the host longer than the kernels take the GPU, for a model of a hundred weights already.
So one launch reads from a table where each weight's tensors lie. Bytes moved for each number: 26 where the gradient is
bfloat16, 28 where it is float32; a master has four bytes in halves as well as whole.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import INTERPRETED

_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_BLOCK = 64 if INTERPRETED else 1024
_CHUNK = 4 * _BLOCK  # of a program: one search in the table for some blocks


@triton.jit
def _update_block(
    weight,
    remainder,
    grad,
    first,
    second,
    count,
    start,
    decay,
    size,
    root,
    scale,
    rest1,
    beta2,
    rest2,
    eps,
    HALVES: tl.constexpr,
    GRAD: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block from `start` on, of the tensors at these addresses. `WHOLE`: aligned to 16 bytes, and none beyond."""
    weight_ptr = weight.to(tl.pointer_type(tl.bfloat16 if HALVES else tl.float32))
    remainder_ptr = remainder.to(tl.pointer_type(tl.int16))
    grad_ptr = grad.to(tl.pointer_type(GRAD))
    first_ptr = first.to(tl.pointer_type(tl.float32))
    second_ptr = second.to(tl.pointer_type(tl.float32))
    at = start + tl.arange(0, BLOCK)
    if WHOLE:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        remainder_ptr = tl.multiple_of(remainder_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        first_ptr = tl.multiple_of(first_ptr, 16)
        second_ptr = tl.multiple_of(second_ptr, 16)
    inside = None if WHOLE else at < count

    weight = tl.load(weight_ptr + at, mask=inside)
    if HALVES:
        upper = weight.to(tl.int16, bitcast=True).to(tl.int32)
        remainder = tl.load(remainder_ptr + at, mask=inside).to(tl.int32)
        master = ((upper << 16) + remainder).to(tl.float32, bitcast=True)
    else:
        master = weight
    grad = tl.load(grad_ptr + at, mask=inside).to(tl.float32) / scale
    first = tl.load(first_ptr + at, mask=inside)
    second = tl.load(second_ptr + at, mask=inside)

    first = first + rest1 * (grad - first)
    second = second * beta2 + rest2 * grad * grad
    master = master * decay - size * first / (tl.sqrt(second) / root + eps)

    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    if HALVES:
        bits = tl.where(master != master, _NAN, master.to(tl.int32, bitcast=True))
        rounded = ((bits + 0x8000) >> 16).to(tl.int16)
        tl.store(weight_ptr + at, rounded.to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(remainder_ptr + at, bits.to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + at, master, mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def _update_kernel(
    table_ptr,
    tensors,
    numbers_ptr,
    rest1,
    beta2,
    rest2,
    eps,
    HALVES: tl.constexpr,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # The last weight whose chunks begin here or before; one that is empty has none.
    begins_ptr = table_ptr + 6 * tensors
    found = 0
    beyond = tensors
    while beyond - found > 1:
        middle = (found + beyond) // 2
        before = tl.load(begins_ptr + middle) <= program
        found = tl.where(before, middle, found)
        beyond = tl.where(before, beyond, middle)

    numbers_ptr += tl.load(table_ptr + 7 * tensors + found) * 8
    decay = tl.load(numbers_ptr)
    size = tl.load(numbers_ptr + 1)
    root = tl.load(numbers_ptr + 2)
    scale = tl.load(numbers_ptr + 3)
    if tl.load(numbers_ptr + 4) > 0:
        return

    weight = tl.load(table_ptr + found)
    remainder = tl.load(table_ptr + tensors + found)
    grad = tl.load(table_ptr + 2 * tensors + found)
    first = tl.load(table_ptr + 3 * tensors + found)
    second = tl.load(table_ptr + 4 * tensors + found)
    count = tl.load(table_ptr + 5 * tensors + found)
    aligned = ((weight | remainder | grad | first | second) & 15) == 0

    begin = (program - tl.load(begins_ptr + found)) * CHUNK
    end = tl.minimum(begin + CHUNK, count)
    # A mask, or an address that is not aligned, has each number loaded by itself, in short blocks for few registers.
    whole_end = tl.where(aligned, begin + (end - begin) // BLOCK * BLOCK, begin)
    for start in range(begin, whole_end, BLOCK):
        _update_block(
            weight, remainder, grad, first, second, count, start, decay, size, root, scale,
            rest1, beta2, rest2, eps, HALVES, GRAD, WHOLE=True, BLOCK=BLOCK,
        )  # fmt: skip
    for start in range(whole_end, end, SHORT):
        _update_block(
            weight, remainder, grad, first, second, count, start, decay, size, root, scale,
            rest1, beta2, rest2, eps, HALVES, GRAD, WHOLE=False, BLOCK=SHORT,
        )  # fmt: skip


def update_all(
    columns: Sequence[Sequence[Tensor | None]],
    rows: Sequence[int],
    numbers: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`master_weights.update_all` in one launch.

    The kernel writes to bare addresses: nothing here looks at the tensors that they come from.

    Args:
        columns: Its first five arguments, in their order, of weights of one type and gradients of one whose name
            torch and Triton share. All tensors are contiguous, at any address, and on one device.
        rows: Each weight's place in `numbers`.
        numbers: `[at least n, 8]`, of `master_weights.step_numbers`.
        betas: AdamW's.
        eps: AdamW's.
    """
    weights: Any = columns[0]
    grads: Any = columns[2]
    if numbers.is_cuda and torch.cuda.is_current_stream_capturing():  # replays would read this call's addresses
        raise RuntimeError("A step of MasterAdamW can't be captured in a CUDA graph. Leave the optimizer out of it.")
    counts = [each.numel() for each in weights]
    *begins, programs = accumulate((-(-count // _CHUNK) for count in counts), initial=0)
    if programs == 0:
        return
    table = array("q")
    for column in columns:
        table.extend([0 if each is None else each.data_ptr() for each in column])
    for column in (counts, begins, rows):
        table.extend(column)
    sent = torch.frombuffer(table, dtype=torch.int64)
    if numbers.is_cuda:  # torch gives this memory to nobody else before the copy is done, so nothing waits
        sent = sent.pin_memory()
    beta1, beta2 = betas
    with torch.cuda.device_of(numbers):
        _update_kernel[(programs,)](
            sent.to(numbers.device, non_blocking=True),
            len(counts),
            numbers,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            HALVES=weights[0].dtype == torch.bfloat16,
            GRAD=getattr(tl, str(grads[0].dtype).removeprefix("torch.")),
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
            SHORT=_BLOCK // 4,
        )
