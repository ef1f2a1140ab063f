"""What policy and reference say of a micro-batch, and how each loss type takes the token weights.

Shapes: B pairs, T scored positions; rows are the chosen responses, then the rejected ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otpo.trl_seam import NOT_OF_THE_MODEL, OURS
from otpo.weighting import PairBatch

# TRL's loss of these types divides a response's sum by its length. The weights are scaled to a mean of one for them,
# so that the sum is divided by the weights' mass.
_LENGTH_NORMALISED = {"ipo", "sigmoid_norm"}
# These losses are likelihoods of the chosen response, and no preference between two.
_UNWEIGHTED = {"sft"}


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a collated batch that the model is called with."""
    return {name: value for name, value in inputs.items() if name not in (*NOT_OF_THE_MODEL, *OURS)}


@dataclass(frozen=True)
class Scored:
    """A micro-batch with its log-probabilities and weights, before the weights multiply anything.

    Attributes:
        outputs: The policy's `FusedCausalLMOutput`.
        policy_logps: `(2B, T)` float, the policy's log-probability of each token, in nats, with gradient.
        reference_logps: `(2B, T)` float, the reference's; zeros where it was not asked.
        weights: `(2B, T)` float, non-negative, zero outside the mask.
        mask: `(2B, T)` bool, true at completion tokens.
        metrics: Numbers that the weighting wants to have logged, by name.
        batch: What the weighting has looked at.
    """

    outputs: Any
    policy_logps: Tensor
    reference_logps: Tensor
    weights: Tensor
    mask: Tensor
    metrics: dict[str, float | Tensor]
    batch: PairBatch

    @property
    def pairs(self) -> int:
        """The number of pairs, B."""
        return self.mask.size(0) // 2

    def weights_for(self, loss_type: str) -> Tensor:
        """The weights as the loss type takes them, `(2B, T)`."""
        if loss_type in _UNWEIGHTED:
            return torch.ones_like(self.weights)
        if loss_type in _LENGTH_NORMALISED:
            mass = self.weights.sum(1, keepdim=True)
            return self.weights * torch.where(mass > 0, self.mask.sum(1, keepdim=True) / mass, 0.0)
        return self.weights

    def outputs_with(self, weights: Tensor) -> Any:
        """The policy's outputs with weighted log-probabilities; WPO's factor stays that of the unweighted ones."""
        # Prompt-learning adapters prepend virtual tokens, which no weight belongs to.
        virtual = self.outputs.log_probs.size(1) - weights.size(1)
        weighted = self.outputs.log_probs * torch.nn.functional.pad(weights, (virtual, 0), value=1.0)
        changed: dict[str, Any] = {**self.outputs, "log_probs": weighted}
        # TRL's WPO subtracts `log_sum_sq_probs` from the log-probabilities, so both move by the same amount.
        if self.outputs.log_sum_sq_probs is not None:
            shift = (weighted - self.outputs.log_probs).detach()
            changed["log_sum_sq_probs"] = self.outputs.log_sum_sq_probs + shift
        return type(self.outputs)(**changed)


class LossGroup(NamedTuple):
    """Loss types that take the same weights, with their coefficients."""

    loss_types: list[str]
    coefficients: list[float]


def loss_groups(loss_types: Sequence[str], coefficients: Sequence[float]) -> list[LossGroup]:
    """The loss types in groups that take the same weights; the group without weights is the last.

    Args:
        loss_types: TRL's names, at least one.
        coefficients: A number for each, by which its loss is multiplied.
    """
    groups: dict[str, LossGroup] = {}
    for loss_type, coefficient in zip(loss_types, coefficients, strict=True):
        if loss_type in _UNWEIGHTED:
            kind = "unweighted"
        else:
            kind = "mean one" if loss_type in _LENGTH_NORMALISED else "as they are"
        group = groups.setdefault(kind, LossGroup([], []))
        group.loss_types.append(loss_type)
        group.coefficients.append(coefficient)
    return sorted(groups.values(), key=lambda group: group.loss_types[0] in _UNWEIGHTED)


def rewarded_loss_type(loss_types: Sequence[str]) -> str:
    """The loss type whose weights the logged `rewards/*` have: the first that takes weights, else the first."""
    return loss_groups(loss_types, [1.0] * len(loss_types))[0].loss_types[0]
