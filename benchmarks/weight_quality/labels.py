"""Which tokens of an answer lie in its known span, and how well a score ranks them. Shapes: n tokens, S scores."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otpo.data.spans import span_tokens


class TokenLabels(NamedTuple):
    """Of the n tokens of a completion, which lie in the known span, and which in the answer at all.

    What else there is of a completion is the chat template's: the end of a turn, a line break.
    """

    in_span: NDArray[np.bool_]
    in_answer: NDArray[np.bool_]

    @property
    def searchable(self) -> bool:
        """Whether the answer has tokens of both classes: a span of the whole answer leaves nothing to find."""
        return bool(self.in_span.any() and (self.in_answer & ~self.in_span).any())


def token_labels(tokenizer: Any, token_ids: Sequence[int], answer: str, spans: Sequence[Sequence[int]]) -> TokenLabels:
    """Finds the tokens that overlap spans of an answer's characters, see [`otpo.data.spans.span_tokens`].

    Args:
        tokenizer: Which the tokens are of.
        token_ids: A completion, n tokens: the answer, perhaps between what its chat template adds.
        answer: As it was given to the template, which may strip it.
        spans: `[start, end)` in characters of the answer.

    Raises:
        ValueError: The completion does not hold the answer as it is.
    """
    tokens = span_tokens(tokenizer, token_ids, answer, [(start, end) for start, end in spans])
    return TokenLabels(tokens.in_spans.any(0), tokens.in_answer)


def auroc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Probability that a token of the positive class has the higher score than one of the other, ties as half.

    The area under the receiver operating characteristic, which is Mann and Whitney's U over the number of pairs.

    Args:
        scores: `(..., n)`, without NaN.
        positive: `(n,)`, the class of each.

    Returns:
        `(...)`, within [0, 1]; 0.5 for scores that tell nothing, NaN where there is one class alone.
    """
    highs, lows = scores[..., positive], scores[..., ~positive]
    if not highs.shape[-1] or not lows.shape[-1]:
        return np.full(scores.shape[:-1], np.nan)
    highs, lows = highs[..., :, None], lows[..., None, :]
    return (highs > lows).mean((-2, -1)) + (highs == lows).mean((-2, -1)) / 2
