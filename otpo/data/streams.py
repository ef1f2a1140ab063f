"""Preference pairs that are read while they are trained on: what is dropped of them, counted and said.

A stream is never read in order to look at it: where it is shuffled, each look would fill its buffer again.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import get_worker_info
from transformers.utils import logging

from .preferences import PairRule, Problem, has_tokens_alone, require_columns
from .token_table import TOKEN_COLUMNS

logger = logging.get_logger(__name__)

_PROBLEMS: tuple[Problem, ...] = ("empty", "identical")
_MOST_READERS = 256
_EXCERPT = 60  # characters of a prompt in a message


class DropCounts:
    """Counts of dropped pairs by problem, in memory that the readers of a stream share.

    A stream's rows are read by this process or by its loader's workers, each of which adds to counts of its own.
    Copies are the same counts, since the loaders copy the stream that holds them.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_MOST_READERS, len(_PROBLEMS), dtype=torch.int64).share_memory_()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DropCounts":
        return self

    def add(self, problem: Problem) -> int:
        """Counts a pair, and returns how many of its problem there are now."""
        worker = get_worker_info()
        reader = 0 if worker is None else 1 + worker.id % (_MOST_READERS - 1)
        place = _PROBLEMS.index(problem)
        self._counts[reader, place] += 1
        return int(self._counts[:, place].sum())

    def as_counter(self) -> Counter[str]:
        """The counts so far, of problems that there were."""
        counts: dict[str, int] = dict(zip(_PROBLEMS, self._counts.sum(0).tolist(), strict=True))
        return +Counter(counts)


def drop_unusable_pairs_of_stream(
    dataset: IterableDataset, rule: PairRule, name: str
) -> tuple[IterableDataset, DropCounts]:
    """Leaves out the pairs of a tokenized stream that no loss can be computed on, while it is read.

    Args:
        dataset: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, read by nobody yet.
        rule: What is left out. An identical pair that it refuses ends the reading with a `ValueError`.
        name: What the dataset is called in messages.

    Returns:
        The stream and its counts, which grow while it is read.
    """
    counts = DropCounts()
    return dataset.filter(_UsablePair(rule, name, counts), with_indices=True), counts


class FirstRow:
    """The identity, as a function to map over a stream that does not know its columns; looks at the first row.

    Raises:
        AlreadyTokenized: The row holds tokens alone.
        ValueError: It lacks a column of preference data.
    """

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, False

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example."""
        if not self.seen:
            self.seen = True
            if has_tokens_alone(example):
                raise AlreadyTokenized
            require_columns(example, self.name)
        return example


class AlreadyTokenized(Exception):
    """A stream's rows need no tokenization."""


class _UsablePair:
    """The rule as a filter of a stream, which counts what it drops."""

    def __init__(self, rule: PairRule, name: str, counts: DropCounts) -> None:
        self.rule, self.name, self.counts = rule, name, counts

    def __call__(self, example: dict[str, Any], index: int) -> bool:
        problem = self.rule.problem(*(example[column] for column in TOKEN_COLUMNS))
        if problem is None:
            return True
        if problem == "identical":
            self.rule.refuse_identical(self._called(example, index))
        if self.counts.add(problem) == 1 and problem == "identical":
            logger.warning(
                f"{self._called(example, index)} has the same chosen and rejected completion, so it states no "
                "preference. It is dropped, and so are others like it; `dropped_pairs` of the trainer counts them."
            )
        return False

    def _called(self, example: Mapping[str, Any], index: int) -> str:
        """The row by its number and its text: shuffled, or shared by workers, a stream's number alone is no name."""
        worker = get_worker_info()
        reader = "" if worker is None else f" by worker {worker.id} of {worker.num_workers}"
        return f"Row {index} of the {self.name} dataset, as the stream was read{reader}, {_beginning(example)},"


def _beginning(example: Mapping[str, Any]) -> str:
    """How a pair's prompt begins, as text where there is some."""
    prompt = example.get("prompt")
    if prompt:
        text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        return f"whose prompt begins {text[:_EXCERPT]!r}"
    return f"whose tokens begin {[*example['prompt_ids'], *example['chosen_ids']][:8]}"
