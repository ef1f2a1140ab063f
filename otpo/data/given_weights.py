"""Weights that the user gives: a number for each token of an answer, or for spans of its characters."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from .preferences import PairRule
from .spans import span_tokens
from .templates import text_behind_answer
from .token_values import scored_part

# Weights are stored in float32; a response's weighted sum of log-probabilities has to fit there, too.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), 1e30


def given_weights(row: Mapping[str, Any], rule: PairRule, tokenizer: Any) -> tuple[Any, Any]:
    """The weights in a row's columns `chosen_weights` and `rejected_weights`, of the tokens that are scored.

    A column holds one of two things:

    - a number for each token: of the completion, or of the answer alone, in which case what the chat template puts
      around it weighs 1;
    - a list of spans `[start, end, weight]` in characters of the answer, `end` not included: of the last message, or
      of the text in `chosen` behind the prompt. A token that overlaps a span gets its weight, that of the last such
      span in the list; tokens in no span weigh 1, those of tool calls too. An empty list is no span, unless the row's
      other column has numbers of tokens.

    Args:
        row: With the columns, and `prompt_ids`, `chosen_ids` and `rejected_ids`.
        rule: How the pair is truncated; weights of tokens that are cut off are cut off with them.
        tokenizer: Which the tokens are of.

    Raises:
        ValueError: A weight is negative, or not finite, or there are too many or too few; as the end of a sentence.
    """
    columns: dict[str, list[Any]] = {}
    for side in ("chosen", "rejected"):
        given = row.get(f"{side}_weights")
        if given is None:
            raise ValueError(
                f"has no '{side}_weights'. Give a weight for each token, or a list of [start, end, weight]."
            )
        if not _is_list(given):
            raise ValueError(
                f"has {given!r} in '{side}_weights', which is no list. Give a weight for each token, or a list of "
                "[start, end, weight]."
            )
        columns[side] = list(given)
    first = next((given[0] for given in columns.values() if given), [])
    make = _of_spans if _is_list(first) else _of_tokens
    chosen, rejected = (
        scored_part(row, side, make(row, side, given, tokenizer), rule) for side, given in columns.items()
    )
    return chosen, rejected


def _of_tokens(row: Mapping[str, Any], side: str, given: list[Any], tokenizer: Any) -> np.ndarray:
    column, ids = f"{side}_weights", row[f"{side}_ids"]
    for place, weight in enumerate(given):
        if _is_list(weight):
            raise ValueError(
                f"has {weight!r} at {column}[{place}], and numbers of tokens beside it. Give one or other."
            )
        if isinstance(weight, Mapping):
            raise ValueError(
                f"has {weight!r} at {column}[{place}]. Give numbers of tokens, or each span as a list, "
                "[start, end, weight]."
            )
        _require_weight(weight, f"{column}[{place}]")
    if len(given) == len(ids):
        return np.array(given, np.float32)
    answer = _answer(row, side, tokenizer)
    in_answer = None if answer is None else _in_answer(row, side, answer, tokenizer)
    if in_answer is not None:
        if len(given) == in_answer.sum():
            weights = np.ones(len(ids), np.float32)
            weights[in_answer] = given
            return weights
        counted = f"{len(ids)} tokens, of which {in_answer.sum()} are the answer's and the rest the chat template's"
    else:
        counted = f"{len(ids)} tokens"
    raise ValueError(
        f"has {len(given)} numbers in {column!r}, and its completion has {counted}. Give a number for each of "
        "either, or spans of characters, [start, end, weight], which need no tokenizer."
    )


def _in_answer(row: Mapping[str, Any], side: str, answer: str, tokenizer: Any) -> np.ndarray | None:
    """Which of a completion's tokens are the answer's, None where the answer can't be found in it."""
    try:
        behind = text_behind_answer(row, side, tokenizer)
        return span_tokens(tokenizer, row[f"{side}_ids"], answer, behind=behind).in_answer
    except ValueError:
        return None


def _of_spans(row: Mapping[str, Any], side: str, given: list[Any], tokenizer: Any) -> np.ndarray:
    column, ids = f"{side}_weights", row[f"{side}_ids"]
    weights = np.ones(len(ids), np.float32)
    if not given:  # so nothing has to be found, which a message of tool calls alone would not allow
        return weights
    answer = _answer(row, side, tokenizer)
    if answer is None:
        raise ValueError(
            f"has spans of characters in {column!r}, and no answer in plain text that they could be of. Give a number "
            "for each token."
        )
    spans = []
    for place, span in enumerate(given):
        if not _is_list(span) or len(span) != 3 or not all(_is_number(number) for number in span):
            raise ValueError(f"has {span!r} at {column}[{place}], which is no [start, end, weight].")
        (start, end), weight = (_as_float(index) for index in span[:2]), span[2]
        # NaN and infinity are in no answer, so that only finite numbers are rounded.
        if not 0 <= start < end <= len(answer) or start != int(start) or end != int(end):
            raise ValueError(
                f"has the span [{start:g}, {end:g}) at {column}[{place}], and its answer has {len(answer)} "
                f"characters, {_shown(answer)}. Spans are whole numbers with 0 <= start < end, within the answer."
            )
        _require_weight(weight, f"{column}[{place}]")
        spans.append((int(start), int(end)))
    try:
        behind = text_behind_answer(row, side, tokenizer)
        found = span_tokens(tokenizer, ids, answer, spans, behind).in_spans
    except ValueError as error:
        raise ValueError(f"has weights in {column!r} that can't be placed. {error}") from error
    for tokens, (_, _, weight) in zip(found, given, strict=True):
        weights[tokens] = weight
    return weights


def _answer(row: Mapping[str, Any], side: str, tokenizer: Any) -> str | None:
    """The text that spans are of; None where it is not text, or where the row has tokens alone."""
    answer = row.get(side)
    if isinstance(answer, list) and answer:
        answer = answer[-1].get("content")
    if not isinstance(answer, str):
        return None
    ending = getattr(tokenizer, "eos_token", None)
    # TRL ends plain text with it.
    return answer.removesuffix(ending) if ending and not isinstance(row[side], list) else answer


def _shown(text: str) -> str:
    told = repr(text)
    return told if len(told) <= 60 else f"{told[:57]}..."


def _require_weight(weight: Any, where: str) -> None:
    value = _as_float(weight) if _is_number(weight) else math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"has the weight {weight!r} at {where}. Weights are finite numbers of at least 0.")
    if value > _MOST or 0 < value < _LEAST:
        raise ValueError(
            f"has the weight {weight!r} at {where}, which float32 can't hold, or not the sums of. Weights are "
            f"0, or from {_LEAST:.3g} to {_MOST:.3g}."
        )


def _as_float(number: Any) -> float:
    """A number in float64, infinite where it is an integer that is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _is_list(value: Any) -> bool:
    """Whether a value is a sequence of others; text is none."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
