"""AdamW of float32 master weights that are kept in two halves: a bfloat16 weight and the 16 bits that it lacks.

The upper half is the weight that the model computes with, the master rounded to the nearest bfloat16. The lower half
is the master's own low 16 bits; read as a signed number it also says whether the upper half was rounded up, so the
master comes back bit for bit. This is the layout of NVIDIA Apex's DistributedFusedAdam (`store_param_remainders`). A
tie goes away from zero: to even, as `Tensor.to` rounds, two masters would have the same halves.

A training begins with weights alone, whose masters could be any number that rounds to them. Apex takes the weights
themselves. Each then lies in the middle of what rounds to it, so that no step moves any weight before steps add up to
half of the distance to the next bfloat16, which at a warm-up's small rates is several steps. Ours lie anywhere, each
place as likely as any other, as the masters of weights that were drawn in float32 do: of a step of a tenth of that
distance a tenth of the weights takes note, and a tensor's weights move by the step in the mean. This is our choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import triton_is_installed

_NAN = 0x7FC00000
_HALF = 0x8000
_INFINITE = 0x7F80  # a bfloat16's bits without its sign
_GRADIENTS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}  # that the kernel reads
_PERIOD = 65_521  # elements after which remainders repeat: a prime, so that rows of a matrix do not have the same


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """A master's two halves.

    Args:
        master: Float32, of any shape.

    Returns:
        The rounded weight's bits, which `.view(torch.bfloat16)` reads, and the remainder; both int16, of that shape. A
        NaN keeps none of its payload, since some would round to zero.
    """
    bits = torch.where(master.isnan(), _NAN, master.view(torch.int32))
    return ((bits + _HALF) >> 16).to(torch.int16), bits.to(torch.int16)


def join_master(upper: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of the halves of [`split_master`], bit for bit; a NaN stays one."""
    return ((upper.to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def first_remainder(weight: Tensor) -> Tensor:
    """The lower halves that a weight's masters begin with: evenly over all that round to it.

    They depend on an element's place alone, and are the same on every device and in every process.

    Args:
        weight: bfloat16, of any shape.

    Returns:
        int16, of that shape; 0 for zeros and what is not finite, beside which a lower half would be another number.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(_PERIOD, generator=generator, device="cpu") * 2 * _HALF // _PERIOD - _HALF
    period = places.to(weight.device, torch.int16)
    remainder = period.repeat(-(-weight.numel() // _PERIOD))[: weight.numel()].view(weight.shape)
    magnitude = weight.detach().view(torch.int16) & 0x7FFF
    return remainder.masked_fill_((magnitude == 0) | (magnitude >= _INFINITE), 0)


def step_numbers(
    steps: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """What a step multiplies and divides by, for each weight, on the device: nothing waits.

    Args:
        steps: `[n]`, the number of each weight's step, from 1.
        lr: The learning rate.
        betas: AdamW's.
        weight_decay: AdamW's.
        grad_scale: What gradients are divided by, a scalar; None for 1.
        found_inf: Above 0 where the step is left out, a scalar; None for 0.

    Returns:
        `[n, 8]` in float32: what is left of the weight after decay, the step's size, the root of the second moment's
        bias correction, the scale, whether the step is left out, and nothing thrice: rows of 32 bytes are aligned
        alike, so that one kernel serves all.
    """
    steps = (
        steps.double()
    )  # as torch.optim computes them in Python's floats; float32 is off by 1e-6 in the first steps
    ones = torch.ones_like(steps)
    columns = (
        ones * (1 - lr * weight_decay),
        lr / (1 - betas[0] ** steps),
        (1 - betas[1] ** steps).sqrt(),
        ones if grad_scale is None else ones * grad_scale,
        ones * 0 if found_inf is None else ones * found_inf,
    )
    return torch.stack([*columns, *[ones] * 3], dim=1).float()


def adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Tensor, betas: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (arXiv 1711.05101) by the operations of `torch.optim.AdamW`, in their order.

    Args:
        master: Float32 weight of any shape.
        grad: Its gradient, in float32.
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        numbers: `[8]`, a row of [`step_numbers`].
        betas: Two numbers.
        eps: Added to the root of the second moment.

    Returns:
        The new master and moments. On the CPU they are those of `torch.optim.AdamW`, bit for bit.
    """
    decay, size, root = numbers[0], numbers[1], numbers[2]
    exp_avg = exp_avg.lerp(grad, 1 - betas[0])
    exp_avg_sq = (exp_avg_sq * betas[1]).addcmul(grad, grad, value=1 - betas[1])
    return master * decay - size * exp_avg / (exp_avg_sq.sqrt() / root + eps), exp_avg, exp_avg_sq


def update_all(
    weights: Sequence[Tensor],
    remainders: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    numbers: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of [`adamw`] in place: on a GPU by one kernel for each pair of types, elsewhere by plain torch.

    Not by what [`otpo_kernels.backend`] says: on the CPU a step has the bits of `torch.optim.AdamW`, always. A weight
    whose tensors are not all contiguous, which the kernel does not read, goes by plain torch as well.

    Args:
        weights: `n`, each bfloat16, the upper halves of its masters, or float32, of any shape; all on one device.
        remainders: int16, the lower halves; None beside a float32 weight.
        grads: In any floating-point types, before they are divided by the scale; they are not written.
        firsts: The first moments, float32.
        seconds: The second moments, float32.
        numbers: `[n, 8]`, of [`step_numbers`].
        betas: AdamW's.
        eps: AdamW's.
    """
    columns = (weights, remainders, grads, firsts, seconds)
    kernel_reads = _kernel_reads(*columns, numbers.device) if _runs_in_triton(numbers) else [False] * len(weights)
    kinds: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}  # a launch each
    for row, (read, weight, remainder, grad, first, second) in enumerate(zip(kernel_reads, *columns, strict=True)):
        if read:
            kinds.setdefault((weight.dtype, grad.dtype), []).append(row)
        elif remainder is None:
            update_whole(weight, grad, first, second, numbers[row], betas, eps)
        else:
            update_halves(weight.view(torch.int16), remainder, grad, first, second, numbers[row], betas, eps)
    if kinds:
        from .master_weights_kernels import update_all as update_in_triton

        for rows in kinds.values():
            update_in_triton([[column[row] for row in rows] for column in columns], rows, numbers, betas, eps)


def _runs_in_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and triton_is_installed()


def _kernel_reads(
    weights: Sequence[Tensor],
    remainders: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    device: torch.device,
) -> list[bool]:
    """Of each weight, whether its tensors are what a kernel takes them for that knows their addresses alone."""
    counts = [each.numel() for each in weights]
    whole = [torch.float32 if each is None else torch.bfloat16 for each in remainders]
    columns = [(remainders, {torch.int16}), (grads, _GRADIENTS), (firsts, {torch.float32}), (seconds, {torch.float32})]
    reads = [
        each.dtype == dtype and each.device == device and each.is_contiguous()
        for each, dtype in zip(weights, whole, strict=True)
    ]
    for column, dtypes in columns:
        reads = [
            read
            and (
                each is None
                or (each.dtype in dtypes and each.numel() == count and each.device == device and each.is_contiguous())
            )
            for read, each, count in zip(reads, column, counts, strict=True)
        ]
    return reads


def update_halves(
    upper: Tensor,
    remainder: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Tensor,
    betas: Any,
    eps: float,
) -> None:
    """[`adamw`] in place, of a master in two halves.

    Args:
        upper: Bits of the bfloat16 weight, int16, of any shape.
        remainder: The lower half, int16.
        grad: In any floating-point type, before it is divided by the scale; it is not written.
        exp_avg: Float32.
        exp_avg_sq: Float32.
        numbers: `[8]`, a row of [`step_numbers`].
        betas: Two numbers.
        eps: Added to the root of the second moment.
    """
    master = join_master(upper, remainder)
    new, first, second = adamw(master, grad.float() / numbers[3], exp_avg, exp_avg_sq, numbers, betas, eps)
    left_out = numbers[4] > 0
    new_upper, new_remainder = split_master(torch.where(left_out, master, new))
    upper.copy_(new_upper)
    remainder.copy_(new_remainder)
    exp_avg.copy_(torch.where(left_out, exp_avg, first))
    exp_avg_sq.copy_(torch.where(left_out, exp_avg_sq, second))


def update_whole(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Tensor, betas: Any, eps: float
) -> None:
    """The same of a float32 weight, which is its own master."""
    new, first, second = adamw(weight, grad.float() / numbers[3], exp_avg, exp_avg_sq, numbers, betas, eps)
    left_out = numbers[4] > 0
    weight.copy_(torch.where(left_out, weight, new))
    exp_avg.copy_(torch.where(left_out, exp_avg, first))
    exp_avg_sq.copy_(torch.where(left_out, exp_avg_sq, second))
