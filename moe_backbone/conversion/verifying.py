"""Compares what two models answer, so that a conversion is proved on the weights that it converted."""

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference of two logits in float32, beside their spread, that sums in another order make."""
_LENGTH = 33


@torch.no_grad()
def answers(model: Any) -> Tensor:
    """Logits of one row of random tokens in float32; the model's weights are cast in place.

    Args:
        model: Any model of transformers with logits.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    logits = model.float().eval()(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.cpu()


def require_equal(left: Tensor, right: Tensor, which: str = "written") -> float:
    """The largest difference of two models' logits.

    Args:
        left: Of the model that was there, any shape.
        right: Of the model that was made of it, of the same shape.
        which: How that one was made, for the message.

    Raises:
        ValueError: It is too large for models that compute the same.
    """
    difference = (left - right).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, left.std(correction=0).item()):  # also where it is not a number
        raise ValueError(
            f"The {which} model answers otherwise: logits differ by up to {difference:.3g}. Please report the "
            "checkpoint's config.json."
        )
    return difference
