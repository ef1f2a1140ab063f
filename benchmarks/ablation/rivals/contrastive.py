"""TIS-DPO's token weights: how much likelier a model that was taught the preference finds a token than its opposite.

Source: TIS-DPO, arXiv 2410.04350. A token's reward is estimated from two contrastive models, `r_t = log pi+(y_t) -
log pi-(y_t)`, and its weight is `w_t = k exp(mu clamp(r_t, L, U))` with mu positive for the chosen response and
negative for the rejected one. k = 1 and |mu| = 1 are the paper's; where we found no source for the bounds they are
our choice.
"""

from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import selective_log_softmax

from otpo.weighting import PairBatch

_ROWS = 4


class ContrastiveWeighting:
    """A weighting of texts that asks two frozen models; both have to share the policy's tokenizer.

    Args:
        positive: A causal LM that prefers chosen responses; it goes to the batch's device and stays as it is.
        negative: One that prefers rejected responses.
        mu: Sharpness, >= 0; 0 gives DPO.
        lower: Least reward of a token, in nats.
        upper: Largest, at least `lower`.

    Raises:
        ValueError: An argument is outside its range, or, when called, the batch has more than text.
    """

    def __init__(
        self, positive: Any, negative: Any, *, mu: float = 1.0, lower: float = -0.5, upper: float = 1.5
    ) -> None:
        if mu < 0 or lower > upper:
            raise ValueError(f"`mu` must be at least 0 and `lower` at most `upper`, got {mu}, {lower}, {upper}.")
        self.models = [model.eval().requires_grad_(False) for model in (positive, negative)]
        self.mu, self.lower, self.upper = mu, lower, upper

    def __call__(self, batch: PairBatch) -> Tensor:
        """Weights `(2B, T)`, within `exp(mu [lower, upper])` for chosen and its inverse for rejected responses."""
        if more := sorted(batch.inputs.keys() - {"input_ids", "attention_mask"}):
            raise ValueError(f"`ContrastiveWeighting` reads text alone, and the batch has {more} too.")
        positive, negative = (_logps(model.to(batch.mask.device), batch) for model in self.models)
        rewards = (positive - negative).clamp(self.lower, self.upper)
        signs = torch.ones_like(rewards)
        signs.chunk(2)[1].neg_()
        return (self.mu * signs * rewards).exp()


def _logps(model: Any, batch: PairBatch) -> Tensor:
    """`(2B, T)` float32, a few rows at a time."""
    ids, attention = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    parts = []
    for rows, mask in zip(ids.split(_ROWS), attention.split(_ROWS), strict=True):
        logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        parts.append(selective_log_softmax(logits, rows[:, 1:]))
    return torch.cat(parts)
