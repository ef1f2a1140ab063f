"""What a weighting looks at and what it returns.

A weighting is any callable that takes a [`PairBatch`] and returns weights of the shape of its mask, or
[`TokenWeights`] when it has numbers to log as well. The trainer multiplies the log-probabilities of the
policy and of the reference by the same weights and lets no gradient through them.

The rows of a batch are the chosen responses followed by the rejected ones, in the same order, as in TRL:
rows `i` and `B + i` make pair `i`. Shapes: B pairs, T positions, D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """What a weighting may look at. All tensors are detached.

    Attributes:
        mask: `(2B, T)` bool, true at completion tokens.
        token_ids: `(2B, T)` the tokens that are scored.
        logps: `(2B, T)` float, the policy's log-probability of each token, in nats; zero outside the mask.
        hidden_states: `(2B, T, D)` the policy's hidden states at the positions that predict each token: the last
            ones, after the final norm, unless the option `hidden_layer` names others.
        step: Optimizer steps done so far.
        inputs: What the policy was called with, such as `input_ids` `(2B, T + 1)` and `attention_mask`, for
            weightings that ask another model.
        reference_logps: `(2B, T)` float, the reference's log-probability of each token, zero outside the mask; None
            where the reference is not asked, as in `otpo explain` without one.
        token_values: Numbers of tokens that were made of the data before training, `(2B, T)` float each, zero outside
            the mask, by the names of `otpo.weighting.token_values`; those that the weighting's entry asks for.
    """

    mask: Tensor
    token_ids: Tensor
    logps: Tensor
    hidden_states: Tensor
    step: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    reference_logps: Tensor | None = None
    token_values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, `(2B, 1)`."""
        return self.mask.sum(1, keepdim=True)

    @property
    def shorter(self) -> Tensor:
        """Tokens of the shorter response of each row's pair, `(2B, 1)`: OTPO's budget `tau`."""
        chosen, rejected = self.lengths.chunk(2)
        return torch.minimum(chosen, rejected).repeat(2, 1)

    @property
    def positions(self) -> Tensor:
        """Index of each token in its response, from 0, `(2B, T)`; meaningless outside the mask."""
        return self.mask.cumsum(1) - 1


class TokenWeights(NamedTuple):
    """Weights `(2B, T)`, at least 0, ignored outside the mask, and numbers to log beside them."""

    values: Tensor
    metrics: dict[str, float | Tensor]


Weighting = Callable[[PairBatch], Tensor | TokenWeights]
