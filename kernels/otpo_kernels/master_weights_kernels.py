"""A step of AdamW on float32 masters, each weight in one pass, in Triton.

torch compiles the same as well, but then each call checks its guards and runs its wrappers, which for a model of a
hundred weights takes the host longer than the kernels take the GPU. Bytes moved for each number: 26 where weight and
gradient are bfloat16, 28 where the gradient or the weight is float32, which has no remainder.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import INTERPRETED

_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_BLOCK = 64 if INTERPRETED else 1024


@triton.jit
def _update_kernel(
    weight_ptr,
    remainder_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    numbers_ptr,
    count,
    rest1,
    beta2,
    rest2,
    eps,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    decay = tl.load(numbers_ptr)
    size = tl.load(numbers_ptr + 1)
    root = tl.load(numbers_ptr + 2)
    scale = tl.load(numbers_ptr + 3)
    if tl.load(numbers_ptr + 4) > 0:
        return

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if HALVES:
        upper = weight.to(tl.int16, bitcast=True).to(tl.int32)
        remainder = tl.load(remainder_ptr + at, mask=inside, other=0).to(tl.int32)
        master = ((upper << 16) + remainder).to(tl.float32, bitcast=True)
    else:
        master = weight
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) / scale
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)

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


def update(
    weight: Tensor,
    remainder: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`master_weights.update` of contiguous tensors of one shape, on one device."""
    count = weight.numel()
    if count == 0:
        return
    beta1, beta2 = betas
    with torch.cuda.device_of(weight):
        _update_kernel[(triton.cdiv(count, _BLOCK),)](
            weight,
            weight if remainder is None else remainder,  # a place for it, which is not read
            grad,
            exp_avg,
            exp_avg_sq,
            numbers,
            count,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            HALVES=remainder is not None,
            BLOCK=_BLOCK,
        )
