"""Which tokens of an answer lie in its known span, and how well a score ranks them. Shapes: n tokens, S scores."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otpo.explain.pieces import split_pieces


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
    """Finds the tokens that overlap spans of an answer's characters.

    Tokens that hold parts of the same sign (a Thai vowel on its consonant, an emoji's bytes) count as one: all of them
    are in the span when the sign is. So no tokenizer's own offsets are trusted.

    Args:
        tokenizer: Which the tokens are of.
        token_ids: A completion, n tokens: the answer, perhaps between what its chat template adds.
        answer: As it was given to the template, which may strip it.
        spans: `[start, end)` in characters of the answer.

    Raises:
        ValueError: The completion does not hold the answer as it is.
    """
    pieces = split_pieces(tokenizer, token_ids)
    text, kept = "".join(piece.text for piece in pieces), answer.strip()
    begin = text.find(kept)
    if begin < 0:
        raise ValueError(
            f"The completion {text!r} does not hold the answer {answer!r}: its spans can't be found. Use a tokenizer "
            "and a chat template that leave the answer's text as it is."
        )
    shift = begin - (len(answer) - len(answer.lstrip()))
    in_answer = _overlapping(pieces, len(token_ids), [(begin, begin + len(kept))])
    in_span = _overlapping(pieces, len(token_ids), [(start + shift, end + shift) for start, end in spans])
    return TokenLabels(in_span & in_answer, in_answer)


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


def unmatched(token_ids: Sequence[int], other_ids: Sequence[int]) -> NDArray[np.float64]:
    """One for the tokens that a plain diff does not find in the other response, zero for the rest, `(n,)`."""
    result = np.ones(len(token_ids))
    for block in SequenceMatcher(None, token_ids, other_ids, autojunk=False).get_matching_blocks():
        result[block.a : block.a + block.size] = 0.0
    return result


def _overlapping(pieces: Sequence[Any], size: int, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    result = np.zeros(size, dtype=bool)
    begin = 0
    for piece in pieces:
        end = begin + len(piece.text)
        if any(begin < stop and start < end for start, stop in spans):
            result[piece.tokens.start : piece.tokens.stop] = True
        begin = end
    return result
