"""What a weighting returns, looked at before the loss is made of it."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from .batch import TokenWeights


def read_answer(answer: Any, mask: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
    """The weights and the numbers to log in what a weighting has returned.

    Args:
        answer: A tensor, or [`TokenWeights`].
        mask: `(2B, T)`, the batch's.

    Returns:
        Weights `(2B, T)`, whatever real type they have, and a number or a tensor of one number by each name.

    Raises:
        TypeError: It is no tensor, or of complex numbers, or what it logs are no numbers; the message says what it is.
        ValueError: The weights have another shape than the mask, or a number to log has more than one element.
    """
    values, metrics = answer if isinstance(answer, TokenWeights) else (answer, {})
    if not isinstance(values, Tensor) or values.is_complex():
        found = "complex numbers" if isinstance(values, Tensor) else f"a `{type(values).__name__}`"
        raise TypeError(
            f"The weighting returned {found} for its weights: return a tensor of real numbers, a weight for each "
            "position of `batch.mask`, or `TokenWeights(weights, numbers_to_log)`."
        )
    if values.shape != mask.shape:
        raise ValueError(
            f"The weighting returned weights of shape {tuple(values.shape)}, the batch's mask has "
            f"{tuple(mask.shape)}: return one weight for each position of `batch.mask`."
        )
    if not isinstance(metrics, Mapping):
        raise TypeError(f"The weighting returned {metrics!r} as numbers to log: return them by name, in a dictionary.")
    for name, number in metrics.items():
        if isinstance(number, Tensor) and number.numel() != 1:
            raise ValueError(
                f"The weighting logs {name!r} as a tensor of shape {tuple(number.shape)}: log one number, such as its "
                "mean."
            )
        if not isinstance(name, str) or not isinstance(number, Tensor | Real):
            raise TypeError(f"The weighting logs {name!r} as {number!r}: log a number, under a name.")
    return values, dict(metrics)
