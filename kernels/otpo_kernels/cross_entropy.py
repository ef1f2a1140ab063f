"""Cross-entropies of rows of logits in their own precision, and their gradient, in one pass each.

Shapes: N rows, V vocabulary.

A float32 copy of the logits would be the largest tensor of a training step. The logits are read once in the forward,
and once more in the backward, which writes their gradient: what is kept for it beside them is a number a row.
"""

from typing import Any

import torch
from torch import Tensor

from .backend import runs_in_triton

IGNORED = -100
"""The label of a row that has none, torch's and transformers' own."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`logsumexp(logits) - logits[label]` of each row, computed in float32 at least.

    Gradients of gradients and forward-mode derivatives are not covered.

    Args:
        logits: `(N, V)`, float16, bfloat16, float32 or float64; a plain tensor, no DTensor of a sharded one.
        labels: `(N,)`, int64, from 0 to V - 1, or -100 for none, on the device of `logits`.

    Returns:
        `(N,)`, float32, or float64 for logits of it; in nats. 0 without a label, with a gradient of 0, whatever the
        logits are. A label outside the vocabulary is seen on the device alone: its loss and its gradient are NaN.

    Raises:
        ValueError: Shapes, devices or types do not fit.
    """
    fits = logits.dim() == 2 and logits.size(1) and labels.shape == logits.shape[:1] and labels.device == logits.device
    if not fits or labels.dtype != torch.int64 or logits.dtype not in _TYPES:
        raise ValueError(
            "`logits` must have shape (N, V) of a word at least and be float16, bfloat16, float32 or float64, and "
            "`labels` must have shape (N,) and be int64, on one device, got "
            f"{tuple(logits.shape)} in {logits.dtype} on {logits.device} and {tuple(labels.shape)} in "
            f"{labels.dtype} on {labels.device}."
        )
    return _cross_entropy(logits, labels)[0]


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in plain torch: each row's loss and the logarithm of its sum of exponentials."""
    logits = logits.to(_type_of_sums(logits))
    sums = logits.logsumexp(dim=-1)
    sums = sums.where(sums != torch.inf, torch.nan)  # as the difference of an infinite logit and itself
    has, right = _look_at(labels, logits.size(-1))
    own = logits.gather(1, labels.where(right, 0).unsqueeze(1)).squeeze(1)
    return (sums - own).where(right, torch.nan).where(has, 0.0), sums


def cross_entropy_backward_reference(grad: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    """What the kernel computes, in plain torch; see [`cross_entropy_reference`]."""
    has, right = _look_at(labels, logits.size(-1))
    gradient = (logits.to(sums.dtype) - sums.unsqueeze(1)).exp()
    gradient.scatter_add_(1, labels.where(right, 0).unsqueeze(1), -right.to(sums.dtype).unsqueeze(1))
    gradient *= grad.to(sums.dtype).where(right, torch.nan).unsqueeze(1)
    return gradient.where(has.unsqueeze(1), 0.0).to(logits.dtype)


def _look_at(labels: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Which rows have a label, and which one of the vocabulary, `(N,)` each."""
    return labels != IGNORED, (labels >= 0) & (labels < vocabulary)


def _type_of_sums(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


@torch.library.custom_op("otpo::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_in_triton(logits):
        return cross_entropy_reference(logits, labels)
    from . import cross_entropy_kernels

    return cross_entropy_kernels.cross_entropy(logits, labels, IGNORED)


@_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.size(0), dtype=_type_of_sums(logits))
    return losses, torch.empty_like(losses)


@torch.library.custom_op("otpo::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(grad: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    if not runs_in_triton(logits):
        return cross_entropy_backward_reference(grad, logits, labels, sums).contiguous()
    from . import cross_entropy_kernels

    return cross_entropy_kernels.cross_entropy_backward(grad, logits, labels, sums, IGNORED)


@_cross_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, of_sums: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return _cross_entropy_backward(grad, *ctx.saved_tensors), None


_cross_entropy.register_autograd(_gradients, setup_context=_save)
