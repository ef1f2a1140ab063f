"""Spans of an answer's characters as tokens of its completion. Shapes: n tokens, S spans."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from otpo.explain.pieces import Piece, as_shown, split_pieces


class SpanTokens(NamedTuple):
    """Which of a completion's tokens lie in its answer, `(n,)` bool, and in each span of it, `(S, n)` bool.

    What else there is of a completion is the chat template's: the end of a turn, a line break.
    """

    in_answer: NDArray[np.bool_]
    in_spans: NDArray[np.bool_]


def span_tokens(
    tokenizer: Any,
    token_ids: Sequence[int],
    answer: str,
    spans: Sequence[tuple[int, int]] = (),
    behind: str = "",
) -> SpanTokens:
    """Finds the tokens that overlap an answer, and spans of its characters.

    Tokens that hold parts of the same sign (a Thai vowel on its consonant, an emoji's bytes) count as one: all of them
    are in the span when the sign is. So no tokenizer's own offsets are trusted.

    A template may strip the white space around an answer, on either side. What of it the completion has counts as the
    answer's.

    Args:
        tokenizer: Which the tokens are of.
        token_ids: A completion, n tokens: the answer, perhaps between what its chat template adds.
        answer: As it was given to the template.
        spans: `[start, end)` in characters of the answer.
        behind: What the template puts behind the answer, such as tool calls, where that may hold the answer's text
            too: the answer is looked for before it. Empty where it is not known.

    Raises:
        ValueError: The completion does not hold the answer as it is, or nothing of a span of it.
    """
    pieces = split_pieces(tokenizer, token_ids)
    text, answer = "".join(piece.text for piece in pieces), as_shown(answer)
    kept, stop = answer.strip() or answer, len(text.removesuffix(as_shown(behind)))
    begin = _last_place(text, kept, stop, pieces, set(tokenizer.all_special_ids), token_ids)
    if begin < 0 and not answer.strip():  # nothing but white space, which the template has stripped
        kept, begin = "", stop
    if begin < 0:
        raise ValueError(
            f"The completion {text!r} does not hold the answer {answer!r}: its spans can't be found. Use a tokenizer "
            "and a chat template that leave the answer's text as it is."
        )
    ahead = answer.index(kept)  # white space before it, and what of that the completion has
    first = begin - _common_start(text[:begin][::-1], answer[:ahead][::-1])
    last = begin + len(kept)
    last += _common_start(text[last:], answer[ahead + len(kept) :])
    shift = begin - ahead
    found = []
    for start, end in spans:
        inside = _overlapping(pieces, len(token_ids), max(start + shift, first), min(end + shift, last))
        if not inside.any():
            raise ValueError(
                f"The completion {text!r} has nothing of the span [{start}, {end}), {answer[start:end]!r}, of the "
                f"answer {answer!r}: the chat template strips it. Leave the span out."
            )
        found.append(inside)
    in_answer = _overlapping(pieces, len(token_ids), first, last)
    return SpanTokens(in_answer, np.array(found, dtype=bool).reshape(len(spans), len(token_ids)))


def _common_start(text: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def _last_place(
    text: str, answer: str, stop: int, pieces: Sequence[Piece], special: set[int], token_ids: Sequence[int]
) -> int:
    """Where the answer begins in the first `stop` characters of the text, -1 for nowhere.

    A template puts earlier messages and thoughts before it, and special tokens behind it. So it is the last place that
    is not within a special token's name.
    """
    named = np.array([int(token) in special for token in token_ids], dtype=bool)
    begin = text.rfind(answer, 0, stop)
    while begin >= 0 and (_overlapping(pieces, len(token_ids), begin, begin + len(answer)) & named).any():
        begin = text.rfind(answer, 0, begin + len(answer) - 1)
    return begin


def _overlapping(pieces: Sequence[Piece], size: int, start: int, stop: int) -> NDArray[np.bool_]:
    result = np.zeros(size, dtype=bool)
    begin = 0
    for piece in pieces:
        end = begin + len(piece.text)
        if start < stop and begin < stop and start < end:
            result[piece.tokens.start : piece.tokens.stop] = True
        begin = end
    return result
