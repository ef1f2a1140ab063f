"""Checks of preference data before the first step: columns, empty completions, identical pairs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .token_table import TOKEN_COLUMNS, column_lengths, rows_with_equal_spans, rows_with_sequences

logger = logging.get_logger(__name__)

Problem = Literal["empty", "identical"]


class RowError(ValueError):
    """A row of the user's data can't be used; the message names it."""


def require_preference_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises a `ValueError` that names the missing columns of the dataset called `name`, or that it has no rows.

    A stream that does not know its columns is not read: see [`otpo.data.streams.FirstRow`].
    """
    columns = dataset.column_names
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(no_rows(name))
    if columns is not None:
        require_columns(columns, name)


def as_lists(dataset: Dataset | IterableDataset, name: str) -> Any:
    """A dataset whose rows have lists: TRL joins tokens with `+`, which adds tensors and arrays (`with_format`).

    Raises:
        ValueError: The rows have a transform of the user's own, which is a format as well.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`, `set_transform`), which would meet tokens, too. "
            "Apply it with `map`."
        )
    return dataset.with_format(None)


def no_rows(name: str) -> str:
    """What is said of a dataset without rows."""
    return f"The {name} dataset has no rows."


def require_columns(columns: Iterable[str], name: str) -> None:
    """Raises a `ValueError` that names the missing columns of preference data."""
    columns = set(columns)
    if has_tokens_alone(columns):
        return
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"The {name} dataset lacks the column(s) {missing}; it has {sorted(columns)}. A preference dataset needs "
            "'chosen' and 'rejected', and 'prompt' unless both start with it: rename yours with "
            "`dataset.rename_column(old, new)`."
        )


def has_tokens_alone(columns: Iterable[str]) -> bool:
    """Whether the columns are those that TRL's tokenization makes, without the text that they are made of."""
    columns = set(columns)
    return set(TOKEN_COLUMNS) <= columns and not {"chosen", "rejected"} <= columns


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row where a stream does not tell, which reads it."""
    return dataset.column_names or list(next(iter(dataset), {}))


@dataclass(frozen=True)
class PairRule:
    """Which pairs can be trained on once they are truncated as the collator truncates them.

    Attributes:
        max_length: Tokens kept of prompt and completion together, None for all.
        truncation_mode: `"keep_start"` or `"keep_end"`, as in `trl.DPOConfig`.
        drop_identical: Whether a pair with equal completions is dropped rather than refused.
    """

    max_length: int | None
    truncation_mode: str
    drop_identical: bool

    def kept(self, length: Any) -> tuple[Any, Any]:
        """The first token that is kept of a prompt with its completion, and how many are.

        Args:
            length: Tokens of both together, a number or an array of them.
        """
        count = length if self.max_length is None else np.minimum(length, self.max_length)
        return (length - count if self.truncation_mode == "keep_end" else 0 * length), count

    def scored(self, prompt: Any, completion: Any) -> tuple[Any, Any]:
        """The first completion token that is left and has a token before it to predict it, and how many are.

        Args:
            prompt: Tokens of the prompt, a number or an array of them.
            completion: Tokens of the completion, likewise.
        """
        first, count = self.kept(prompt + completion)
        begin = np.maximum(first + 1, prompt)
        return begin - prompt, np.maximum(first + count - begin, 0)

    def problem(
        self, prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]
    ) -> Problem | None:
        """What is wrong with a pair of token lists, None when nothing is."""
        spans = []
        for ids in (chosen_ids, rejected_ids):
            first, count = self.scored(len(prompt_ids), len(ids))
            spans.append(list(ids[first : first + count]))
        if not all(spans):
            return "empty"
        return "identical" if spans[0] == spans[1] else None

    def refuse_identical(self, row: str) -> None:
        """Raises a [`RowError`] for an identical pair, called `row`, unless such pairs are dropped."""
        if self.drop_identical:
            return
        limit = "" if self.max_length is None else f" within max_length={self.max_length}"
        raise RowError(
            f"{row} has the same chosen and rejected completion{limit}, so it states no "
            "preference. Remove such rows, or set `drop_identical_pairs=True` to drop and count them. (The first "
            "token of a row without a prompt is not scored, since nothing predicts it.)"
        )


def drop_unusable_pairs(
    dataset: Dataset, rule: PairRule, name: str, numbers: np.ndarray | None = None
) -> tuple[Dataset, Counter[str], np.ndarray | None]:
    """Leaves out the pairs of a tokenized dataset that no loss can be computed on.

    Args:
        dataset: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        rule: What is left out.
        name: What the dataset is called in messages.
        numbers: Number of each row in the dataset that the user named; None where they are the same.

    Returns:
        The dataset; how many pairs were dropped by problem (`"empty"`, `"identical"`); the rows that are left, by
        their number in the dataset that was passed, None where all are.

    Raises:
        ValueError: A pair is identical and `rule` refuses it, or no pair is left.
    """
    empty, identical = _unusable(dataset, rule)
    if len(identical):
        row = identical[0] if numbers is None else numbers[identical].min()
        rule.refuse_identical(f"Row {row} of the {name} dataset")
    dropped = Counter({"empty": len(empty), "identical": len(identical)})
    dropped = +dropped  # those that there are
    if not dropped:
        return dataset, dropped, None
    kept = np.delete(np.arange(len(dataset)), np.concatenate([empty, identical]))
    if not len(kept):
        raise ValueError(nothing_left(name, rule, dropped, len(dataset)))
    logger.warning(
        f"Dropped {dropped.total()} of {len(dataset)} pairs of the {name} dataset: {dropped['empty']} "
        f"with a completion that is empty after truncation to max_length={rule.max_length}, "
        f"{dropped['identical']} with identical completions."
    )
    return dataset.select(kept), dropped, kept


def nothing_left(name: str, rule: PairRule, dropped: Counter[str], size: int) -> str:
    """What is said of a dataset whose pairs were all dropped."""
    remedies = []
    if dropped["empty"]:
        remedies.append("raise `max_length` or shorten the prompts")
    if dropped["identical"]:
        remedies.append("give pairs whose completions differ in the tokens that are scored")
    told = " and ".join(remedies)
    return (
        f"No pair of the {name} dataset is left: {dict(dropped)} of {size}, with max_length={rule.max_length}. "
        f"{told[:1].upper()}{told[1:]}."
    )


def find_pair(dataset: Dataset, rule: PairRule, chosen: Sequence[int], rejected: Sequence[int]) -> list[int]:
    """The rows of a tokenized dataset whose truncated sequences are those; several where pairs are alike.

    Args:
        dataset: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        rule: How sequences are truncated.
        chosen: Tokens of prompt and chosen completion that the collator left.
        rejected: The same with the rejected completion.
    """
    prompt, *completions = column_lengths(dataset, TOKEN_COLUMNS)
    columns = [("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids")]
    firsts, wanted = [], [np.asarray(chosen), np.asarray(rejected)]
    for completion, sequence in zip(completions, wanted, strict=True):
        first, count = rule.kept(prompt + completion)
        firsts.append(np.where(count == len(sequence), first, -1))
    return rows_with_sequences(dataset, columns, firsts, wanted).tolist()


def _unusable(dataset: Dataset, rule: PairRule) -> tuple[np.ndarray, np.ndarray]:
    """The rows with an empty completion, and those with identical ones."""
    prompt, chosen, rejected = column_lengths(dataset, TOKEN_COLUMNS)
    first_chosen, count = rule.scored(prompt, chosen)
    first_rejected, other_count = rule.scored(prompt, rejected)
    empty = (count == 0) | (other_count == 0)
    alike = np.flatnonzero(~empty & (count == other_count))  # only these can be identical
    identical = rows_with_equal_spans(
        dataset,
        ("chosen_ids", "rejected_ids"),
        alike,
        (first_chosen[alike], first_rejected[alike]),
        count[alike],
    )
    return np.flatnonzero(empty), identical
