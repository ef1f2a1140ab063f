"""DeepSpeed's ZeRO 1 and 2 with norms of gradients that no host waits for.

DeepSpeed 0.19.8 asks the device for each group of weights, after the backward pass, whether its norm is finite: twice
where the norm is computed, and once more where gradients are clipped by it. Each time the device runs dry until the
host has launched what follows. It also casts each gradient to double precision, and so moves 18 bytes for two.
What it asks beside norms is left: whether a step of float16 or float32 weights is to be left out, and whether any
gradient is not finite (`bf16.check_grad_overflow`), which is on in fine-tuning and alignment.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .deepspeed_patch import is_known

_INVALID = -1.0  # what DeepSpeed has for a group's norm that is not finite


def spare_waits(optimizer: Any) -> bool:
    """Has an engine's optimizer compute norms and clip without a wait; a second call changes nothing.

    A norm is summed in float32, in place of double precision. What DeepSpeed offloads, stage 3 and releases of
    DeepSpeed that this was not tested on are left as they are.

    Args:
        optimizer: `engine.optimizer`.

    Returns:
        Whether the optimizer is one that does so now.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.cpu_offload or not is_known():
        return False
    optimizer.get_grad_norm_direct = MethodType(_norm_of_group, optimizer)
    optimizer.unscale_and_clip_grads = MethodType(_clip, optimizer)
    return True


def _norm_of_group(self: Any, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
    """A group's norm over all processes, a float32 scalar; -1 where it is not finite."""
    if norm_type != 2 or self.model_parallel_rank != 0:
        return type(self).get_grad_norm_direct(self, gradients, params, norm_type)
    from deepspeed import comm

    own = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    found = [
        gradient.detach()
        for gradient, parameter in zip(own, params, strict=False)  # the last one's may be of the next process
        if not getattr(parameter, "ds_pipe_replicated", False)
    ]
    if found:
        total = torch.stack(torch._foreach_norm(found, 2, dtype=torch.float32)).square().sum().to(self.device)
    else:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
    comm.all_reduce(total, op=comm.ReduceOp.SUM, group=self.dp_process_group)
    self._model_parallel_all_reduce(tensor=total, op=comm.ReduceOp.SUM)
    return torch.where(total.isfinite(), total.sqrt(), _INVALID)


def _clip(self: Any, grad_groups_flat: Any, total_norm: Any) -> None:
    """Divides gradients by the loss scale, and by how far the norm is above what it may be."""
    if self.clip_grad <= 0.0 or not isinstance(total_norm, Tensor):
        type(self).unscale_and_clip_grads(self, grad_groups_flat, total_norm)
        return
    valid = total_norm.isfinite() & (total_norm >= 0)
    norm = torch.where(valid, total_norm, torch.inf) / self.loss_scale
    scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1.0) * self.loss_scale
    for group in grad_groups_flat:
        for gradient in group if isinstance(group, list) else [group]:
            gradient.data.mul_(1.0 / scale)
