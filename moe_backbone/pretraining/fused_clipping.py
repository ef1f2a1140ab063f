"""Clips gradients within the optimizer's own kernel, which saves a pass over all of them.

torch's fused Adam divides gradients by a scale and leaves out a step, both told by tensors on the device; fp16's
scaler uses the same two attributes. So a step whose gradient is not finite changes nothing, and nobody waits to find
out.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from .master_adamw import MasterAdamW

_WHOLE = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
_TINY = 1e-6  # as in torch.nn.utils.clip_grad_norm_

_SCALES: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()
"""What each optimizer that was clipped in is to forget after its next step; a key's optimizer has the hook."""


def takes_scales(optimizer: Any, engine: DistributedType) -> bool:
    """Whether an optimizer is torch's fused Adam or AdamW over whole parameters, or [`MasterAdamW`].

    Args:
        optimizer: torch's, without accelerate's wrapper.
        engine: Of the run; others than plain and data-parallel training clip in ways of their own.
    """
    if engine in _WHOLE and type(optimizer) is MasterAdamW:
        return True
    # A subclass may have a step of its own, and a checkpoint may bring groups that are not fused.
    if engine not in _WHOLE or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    groups = optimizer.param_groups
    whole = not any(isinstance(each, DTensor) for group in groups for each in group["params"])
    return whole and all(group["fused"] for group in groups)


def clip_in_optimizer(optimizer: Any, max_norm: float) -> Tensor:
    """Has an optimizer's next step clip its gradients to a norm, and leave the step out where the norm is not finite.

    A second call before that step replaces the first.

    Args:
        optimizer: One that [`takes_scales`]. Gradients keep their values until its step.
        max_norm: > 0.

    Returns:
        The norm of all gradients before clipping, a scalar on their device.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(
            f"`max_norm={max_norm}` must be above 0. Don't call it for gradients that are not to be clipped."
        )
    gradients = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    norm = _total_norm(gradients)
    # One hook for all steps: torch goes through the hooks while it calls them, so that none may remove itself.
    if optimizer not in _SCALES:
        optimizer.register_step_post_hook(_forget)
    scales = {"grad_scale": ((norm + _TINY) / max_norm).clamp(min=1.0).float()}
    scales["found_inf"] = (~norm.isfinite()).float()
    _SCALES[optimizer] = scales
    for name, value in scales.items():
        setattr(optimizer, name, value)
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients in float32; torch's own has the gradients' type, of bfloat16 with three digits."""
    if all(each.dtype == torch.float32 for each in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(each.dtype for each in gradients):  # in one order, so that processes have the same bits
        norms += torch._foreach_norm([each for each in gradients if each.dtype == dtype], 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([each.to(norms[0].device, non_blocking=True) for each in norms]))


def _forget(optimizer: Any, *_: Any) -> None:
    """Ends the scales with the step that they were for; fp16's scaler takes its own back itself."""
    for name, value in _SCALES.get(optimizer, {}).items():
        if getattr(optimizer, name, None) is value:
            delattr(optimizer, name)
    _SCALES[optimizer] = {}
