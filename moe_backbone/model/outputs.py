"""Outputs of the Compass models.

Shapes: B rows, L tokens of a row, T = B * L, E experts, K experts that a token takes, H hidden size.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class CompassModelOutput(MoeModelOutputWithPast):
    """Output of the decoder.

    Attributes:
        expert_indices: Experts that each token took, a tensor `[T, K]` for each layer.
    """

    expert_indices: tuple[Tensor, ...] | None = None


@dataclass
class CompassMtpOutput(ModelOutput):
    """Output of the MTP layers, a tensor for each layer.

    Attributes:
        states: States that the head reads, `[B, L, H]`.
        router_logits: Logits of the routers, `[T, E]`.
        expert_indices: Experts that each token took, `[T, K]`.
    """

    states: tuple[Tensor, ...] = ()
    router_logits: tuple[Tensor, ...] | None = None
    expert_indices: tuple[Tensor, ...] | None = None


@dataclass
class CompassCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of the causal language model: transformers' fields, the parts of the loss, and the experts' load.

    `aux_loss` and `z_loss` are there in training with `labels` where either has a weight, and wherever the caller asks
    for router logits.

    Attributes:
        lm_loss: Loss of the next token.
        mtp_loss: Mean of the MTP layers' losses, in training.
        z_loss: The router's z-loss, beside the inherited `aux_loss`.
        expert_load: Number of tokens that each expert took, `[layers, E]`; MTP layers that ran come last. It is there
            in all training with `labels`, and wherever `aux_loss` is.
    """

    lm_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    z_loss: Tensor | None = None
    expert_load: Tensor | None = None
