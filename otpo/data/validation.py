"""Checks of preference data before the first step: columns, empty completions, identical pairs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from transformers.utils import logging

logger = logging.get_logger(__name__)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""What TRL's tokenization of a pair makes."""
ROWS_AT_ONCE = 1000
"""Rows read together in a pass over a dataset."""

Problem = Literal["empty", "identical"]


def require_preference_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises a `ValueError` that names the missing columns of the dataset called `name`."""
    columns = column_names(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} dataset has no rows.")
    if is_tokenized(dataset):
        return
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"The {name} dataset lacks the column(s) {missing}; it has {sorted(columns)}. A preference dataset needs "
            "'chosen' and 'rejected', and 'prompt' unless both start with it: rename yours with "
            "`dataset.rename_column(old, new)`."
        )


def is_tokenized(dataset: Dataset | IterableDataset) -> bool:
    """Whether the dataset has the columns that TRL's tokenization makes, and no text to make them of."""
    columns = column_names(dataset)
    return set(TOKEN_COLUMNS) <= set(columns) and not {"chosen", "rejected"} <= set(columns)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row where a stream does not tell."""
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

    def problem(
        self, prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int]
    ) -> Problem | None:
        """What is wrong with a pair of token lists, None when nothing is."""
        chosen = self._scored(prompt_ids, chosen_ids)
        rejected = self._scored(prompt_ids, rejected_ids)
        if not chosen or not rejected:
            return "empty"
        return "identical" if list(chosen) == list(rejected) else None

    def _scored(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Sequence[int]:
        """Completion tokens that are left and have a token before them to predict them."""
        sequence = [*prompt_ids, *completion_ids]
        kept = self.truncate(sequence)
        lost_in_front = len(sequence) - len(kept) if self.truncation_mode == "keep_end" else 0
        return kept[max(1, len(prompt_ids) - lost_in_front) :]

    def truncate(self, sequence: list[int]) -> list[int]:
        """What the collator leaves of a prompt with its completion."""
        if self.max_length is None:
            return sequence
        return sequence[: self.max_length] if self.truncation_mode == "keep_start" else sequence[-self.max_length :]

    def refuse_identical(self, row: int, name: str) -> None:
        """Raises a `ValueError` for an identical pair, unless such pairs are dropped."""
        if self.drop_identical:
            return
        limit = "" if self.max_length is None else f" within max_length={self.max_length}"
        raise ValueError(
            f"Row {row} of the {name} dataset has the same chosen and rejected completion{limit}, so it states no "
            "preference. Remove such rows, or set `drop_identical_pairs=True` to drop and count them."
        )


def drop_unusable_pairs(
    dataset: Dataset | IterableDataset, rule: PairRule, name: str
) -> tuple[Dataset | IterableDataset, Counter[str], list[int]]:
    """Leaves out the pairs of a tokenized dataset that no loss can be computed on.

    Args:
        dataset: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        rule: What is left out.
        name: What the dataset is called in messages.

    Returns:
        The dataset; how many pairs were dropped by problem (`"empty"`, `"identical"`); the rows that are left, by
        their number in the dataset that was passed. A streamed dataset is read only later, so its counts grow
        while it is read by this process, and no rows are listed.

    Raises:
        ValueError: A pair is identical and `rule` refuses it, or no pair is left.
    """
    dropped: Counter[str] = Counter()
    if isinstance(dataset, IterableDataset):
        kept = dataset.filter(_StreamFilter(rule, name, dropped), with_indices=True)
        if next(iter(kept), None) is None:
            raise ValueError(_nothing_left(name, rule, dropped, sum(dropped.values())))
        dropped.clear()  # of this look at its first pair
        return kept, dropped, []

    kept = []
    for row, tokens in enumerate(token_lists(dataset)):
        problem = rule.problem(*tokens)
        if problem is None:
            kept.append(row)
            continue
        if problem == "identical":
            rule.refuse_identical(row, name)
        dropped[problem] += 1
    if not kept:
        raise ValueError(_nothing_left(name, rule, dropped, len(dataset)))
    if dropped:
        logger.warning(
            f"Dropped {sum(dropped.values())} of {len(dataset)} pairs of the {name} dataset: {dropped['empty']} "
            f"with a completion that is empty after truncation to max_length={rule.max_length}, "
            f"{dropped['identical']} with identical completions."
        )
        dataset = dataset.select(kept)
    return dataset, dropped, kept


def _nothing_left(name: str, rule: PairRule, dropped: Counter[str], size: int) -> str:
    return (
        f"No pair of the {name} dataset is left: {dict(dropped)} of {size}, with "
        f"max_length={rule.max_length}. Raise `max_length` or shorten the prompts."
    )


def token_lists(dataset: Dataset) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """The prompt, chosen and rejected tokens of each row of a tokenized dataset."""
    tokens = dataset.select_columns(list(TOKEN_COLUMNS))
    for batch in tokens.iter(ROWS_AT_ONCE):
        yield from zip(*(batch[column] for column in TOKEN_COLUMNS), strict=True)  # pyright: ignore


class _StreamFilter:
    """The rule as a filter of a stream, which counts what it drops."""

    def __init__(self, rule: PairRule, name: str, dropped: Counter[str]) -> None:
        self.rule, self.name, self.dropped = rule, name, dropped

    def __call__(self, example: dict[str, Any], row: int) -> bool:
        problem = self.rule.problem(*(example[column] for column in TOKEN_COLUMNS))
        if problem == "identical":
            self.rule.refuse_identical(row, self.name)
        if problem is not None:
            self.dropped[problem] += 1
        return problem is None
