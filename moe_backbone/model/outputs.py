"""What the Compass models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class CompassModelOutput(MoeModelOutputWithPast):
    """Adds `expert_indices`: the experts that each layer's tokens took, a tensor `[T, K]` a layer."""

    expert_indices: tuple[Tensor, ...] | None = None


@dataclass
class CompassMtpOutput(ModelOutput):
    """States of the MTP layers, `[B, L, H]` each, and what their routers did."""

    states: tuple[Tensor, ...] = ()
    router_logits: tuple[Tensor, ...] | None = None
    expert_indices: tuple[Tensor, ...] | None = None


@dataclass
class CompassCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds the parts of the loss, and the load of the experts.

    Attributes:
        lm_loss: Loss of the next token.
        mtp_loss: Mean of the MTP layers' losses, in training.
        z_loss: The router's z-loss, wherever `aux_loss` is: where either weighs anything in training, or router logits
            are asked for.
        expert_load: Tokens of each expert, `[layers, E]`, in training with `labels` whatever weighs anything, and
            wherever `aux_loss` is; MTP layers that ran come last.
    """

    lm_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    z_loss: Tensor | None = None
    expert_load: Tensor | None = None
