"""Tokens as text that can be shown: whole characters, whole graphemes, nothing lost and nothing doubled.

A token of a byte-level vocabulary may hold a part of a character, as most Thai letters and emoji are split, and a
character may be a part of what is read as one sign: a Thai vowel on its consonant, an emoji with a skin tone. Such
tokens are shown as one piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import regex

# What a decoder writes for bytes that are no character, and what is shown for them.
_UNDECODED = "\N{REPLACEMENT CHARACTER}"
_CUT_OFF = "\N{WHITE SQUARE}"


@dataclass(frozen=True)
class Piece:
    """A run of tokens that is shown as one.

    Attributes:
        text: Whole graphemes. `□` stands for bytes that are no character, as where truncation cut one in half.
        tokens: Places of its tokens in the sequence, one or more.
    """

    text: str
    tokens: range


def split_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[Piece]:
    """Splits a sequence of tokens into pieces whose texts, joined, are the decoded text.

    Args:
        tokenizer: A `transformers` tokenizer.
        token_ids: N tokens; special ones are shown as they are written.

    Returns:
        Pieces that cover all N tokens in order.
    """
    decoded = list(_decoded(tokenizer, token_ids))
    graphemes = regex.findall(r"\X", "".join(text for text, _ in decoded))
    ends, length = set(), 0
    for grapheme in graphemes:
        length += len(grapheme)
        ends.add(length)

    pieces: list[Piece] = []
    text, start, length = "", 0, 0
    for part, stop in decoded:
        text, length = text + part, length + len(part)
        if text and length in ends:
            pieces.append(Piece(as_shown(text), range(start, stop)))
            text, start = "", stop
    if start < len(token_ids):  # tokens without text at the end
        last = pieces.pop() if pieces else Piece("", range(0))
        pieces.append(Piece(last.text + text, range(last.tokens.start, len(token_ids))))
    return pieces


def as_shown(text: str) -> str:
    """A text with `□`, as pieces have it, for each replacement character; those of the text itself look the same."""
    return text.replace(_UNDECODED, _CUT_OFF)


def token_labels(pieces: Sequence[Piece], longest: int = 12) -> list[str]:
    """A short name for each token: its piece's text, and which part of it where a piece has several.

    Args:
        pieces: Pieces of a response.
        longest: Graphemes that are kept of a text.
    """
    labels = []
    for piece in pieces:
        name = shorten(piece.text.replace("\n", "↵").strip() or "␣", longest)
        count = len(piece.tokens)
        labels += [name] if count == 1 else [f"{name} {part}/{count}" for part in range(1, count + 1)]
    return labels


def shorten(text: str, longest: int) -> str:
    """The first `longest` graphemes of a text, with an ellipsis where there are more."""
    graphemes = regex.findall(r"\X", text)
    return text if len(graphemes) <= longest else "".join(graphemes[: longest - 1]) + "…"


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Texts of runs of tokens that end with a whole character, and where each run ends.

    A run is decoded behind the run before it, since decoders treat the front of a text in a way of their own.
    """
    before, start = 0, 0
    for stop in range(1, len(token_ids) + 1):
        text = _decode(tokenizer, token_ids[before:stop])
        if text.endswith(_UNDECODED) and stop < len(token_ids):
            continue
        yield text[len(_decode(tokenizer, token_ids[before:start])) :], stop
        before, start = start, stop


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    if not len(token_ids):
        return ""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
