"""How the sum of tokens' cross-entropies is computed where a training needs no logits.

A float32 copy of the logits is the largest tensor of a step, and the model makes one for the next token and one for
each MTP layer. Each function here has the signature of `CompassForCausalLM.token_loss`. Shapes: B rows, L tokens of a
row, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_backbone.model.mtp import IGNORED, run_shared_head
from otpo_kernels.backend import triton_is_installed
from otpo_kernels.cross_entropy import cross_entropy

TOKEN_LOSSES = ("logits", "kernel", "chunked")
"""What the option `token_loss` may be, beside `auto`."""


def kernel_loss(head: nn.Module, states: Tensor, labels: Tensor, detach: bool) -> Tensor:
    """The sum of cross-entropies by one kernel each way, which reads logits in the head's own precision.

    Args:
        head: The model's `lm_head`, which is called as a module.
        states: `[B, L, H]`.
        labels: `[B, L]`, the token that each state predicts, -100 for none.
        detach: Whether the gradient stops before the head's parameters.

    Returns:
        The sum, a float32 scalar; 0 without labels.
    """
    return cross_entropy(run_shared_head(head, states, detach).flatten(0, 1), labels.flatten()).sum()


def chunked_loss(head: nn.Module, states: Tensor, labels: Tensor, detach: bool) -> Tensor:
    """The same by TRL's chunked head, which has the logits of 4,096 tokens and 32,768 words at a time.

    It runs the head's product once more for the gradient. See [`kernel_loss`] for the arguments.
    """
    from trl.kernels import ChunkedLogProbFunction  # brings TRL's trainers with it
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    own: Any = head.weight
    weight: Any = own.full_tensor() if isinstance(head.weight, DTensor) else own
    bias: Any = getattr(head, "bias", None)
    if detach:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    labels = labels.flatten()
    with maybe_gather_lm_head_ctx(own, bias):
        found: Any = ChunkedLogProbFunction.apply(
            states.flatten(0, 1), weight, bias, labels.clamp(min=0), 1.0, _CHUNK, None, 1.0, ("log_probs",)
        )
    return -found[0].masked_fill(labels == IGNORED, 0.0).sum()


def find_token_loss(name: str, model: Any, device: torch.device) -> Any:
    """The function of a name, as `CompassForCausalLM.token_loss` takes it; None for `logits`.

    Args:
        name: One of [`TOKEN_LOSSES`], or `auto`: `kernel` on a GPU with Triton, `logits` elsewhere.
        model: A `CompassForCausalLM`.
        device: That trains it.

    Raises:
        ValueError: The head is not a plain linear layer, which `chunked` needs, or Triton, which `kernel` needs on a
            GPU, is not installed.
    """
    if name == "auto":
        name = "kernel" if device.type == "cuda" and triton_is_installed() else "logits"
    if name == "kernel" and device.type == "cuda" and not triton_is_installed():
        raise ValueError(
            "`token_loss=kernel` needs Triton on a GPU, and it is not installed (pip install 'otpo[triton]'). "
            "Set `token_loss=logits`."
        )
    if name == "chunked" and type(model.lm_head) is not nn.Linear:
        raise ValueError(
            f"`token_loss=chunked` multiplies by a plain head's weights, and this head is a "
            f"{type(model.lm_head).__name__}. Set `token_loss=logits`."
        )
    return {"logits": None, "kernel": kernel_loss, "chunked": chunked_loss}[name]


_CHUNK = 32_768
"""Tokens of the vocabulary in a tile, TRL's own choice."""
