"""What the models said of a micro-batch, and how each loss type takes its weights.

Shapes: B pairs, T scored positions; rows are the chosen responses, then the rejected ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Most loss types sum weighted log-ratios. These divide by the completion's length, so weights of mean one make
# that a division by the weights' mass.
_LENGTH_NORMALISED = {"ipo", "sigmoid_norm"}
# The likelihood of the chosen response is no preference.
_UNWEIGHTED = {"sft"}


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collated batch the model is called with."""
    ours = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    return {name: value for name, value in inputs.items() if name not in ours}


@dataclass(frozen=True)
class Scored:
    """A micro-batch before its weights are applied.

    Attributes:
        outputs: The policy's `FusedCausalLMOutput`.
        policy_logps: `(2B, T)`, with gradient.
        reference_logps: `(2B, T)`.
        weights: `(2B, T)`, zero outside the mask.
        mask: `(2B, T)` bool, true at completion tokens.
        metrics: Numbers to log about the weights.
    """

    outputs: Any
    policy_logps: Tensor
    reference_logps: Tensor
    weights: Tensor
    mask: Tensor
    metrics: dict[str, float | Tensor]

    def weights_for(self, loss_type: str) -> Tensor:
        """The weights as the loss type takes them, `(2B, T)`."""
        if loss_type in _UNWEIGHTED:
            return torch.ones_like(self.weights)
        if loss_type in _LENGTH_NORMALISED:
            mass = self.weights.sum(1, keepdim=True)
            return self.weights * torch.where(mass > 0, self.mask.sum(1, keepdim=True) / mass, 0.0)
        return self.weights

    def outputs_with(self, weights: Tensor) -> Any:
        """The policy's outputs with weighted log-probabilities, and WPO's factor as if they were not."""
        virtual = self.outputs.log_probs.size(1) - weights.size(1)
        weighted = self.outputs.log_probs * torch.nn.functional.pad(weights, (virtual, 0), value=1.0)
        changed: dict[str, Any] = {**self.outputs, "log_probs": weighted}
        if self.outputs.log_sum_sq_probs is not None:
            shift = (weighted - self.outputs.log_probs).detach()
            changed["log_sum_sq_probs"] = self.outputs.log_sum_sq_probs + shift
        return type(self.outputs)(**changed)


def rewarded_loss_type(loss_types: Sequence[str]) -> str:
    """The loss type whose weights the logged `rewards/*` have: the first that is weighted, else the first."""
    return loss_groups(loss_types, [1.0] * len(loss_types))[0][0][0]


def loss_groups(loss_types: Sequence[str], coefficients: Sequence[float]) -> list[tuple[list[str], list[float]]]:
    """Loss types that take the same weights, with their coefficients; the unweighted ones last."""
    groups: dict[str, tuple[list[str], list[float]]] = {}
    for loss_type, coefficient in zip(loss_types, coefficients, strict=True):
        if loss_type in _UNWEIGHTED:
            kind = "unweighted"
        else:
            kind = "mean one" if loss_type in _LENGTH_NORMALISED else "as they are"
        names, factors = groups.setdefault(kind, ([], []))
        names.append(loss_type)
        factors.append(coefficient)
    return sorted(groups.values(), key=lambda group: group[0][0] in _UNWEIGHTED)
