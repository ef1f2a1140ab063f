"""Datasets that are ready for training, each with the way back to the rows that the user passed."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset, IterableDataset
from torch import Tensor

from .preferences import PairRule, drop_unusable_pairs, find_pair, nothing_left
from .streams import DropCounts, drop_unusable_pairs_of_stream
from .token_table import TOKEN_COLUMNS

Rows = Dataset | IterableDataset


@dataclass(frozen=True)
class PreparedRows:
    """What is known of a dataset's rows that the dataset itself does not say.

    Attributes:
        name: What the dataset is called: `"train"`, `"eval"`, or the name in an `eval_dataset` of several.
        rule: How its pairs are truncated, and which are left out.
        kept: The row in the dataset that was passed of each of its rows; None where they are the same, as in streams.
        numbers: The row in the dataset that the user named of each row that was passed; None where they are the same.
        counts: How many pairs were left out; of a stream in all readings of it.
        unfiltered: A stream with all its pairs, for looks at a row that must not count as reading; else None.
    """

    name: str
    rule: PairRule
    kept: np.ndarray | None
    numbers: np.ndarray | None
    counts: Counter[str] | DropCounts
    unfiltered: IterableDataset | None

    @property
    def dropped(self) -> Counter[str]:
        """How many pairs were left out so far, by problem."""
        return self.counts.as_counter() if isinstance(self.counts, DropCounts) else self.counts

    def original(self, row: int) -> int:
        """The row in the user's dataset of a row of the prepared one."""
        passed = row if self.kept is None else int(self.kept[row])
        return passed if self.numbers is None else int(self.numbers[passed])


class PreparedDatasets:
    """The datasets that a trainer has prepared, each with its [`PreparedRows`].

    A dataset is known by itself, never by its name: an evaluation dataset may be called "train" too.
    """

    def __init__(self) -> None:
        self._rows: WeakKeyDictionary[Rows, PreparedRows] = WeakKeyDictionary()
        self._named: dict[str, PreparedRows] = {}

    def prepare(self, dataset: Rows, rule: PairRule, name: str, numbers: np.ndarray | None = None) -> Rows:
        """Leaves out the pairs of a tokenized dataset that no loss can be computed on, and keeps the way back.

        Args:
            dataset: The tokenized dataset.
            rule: What is left out.
            name: What the dataset is called.
            numbers: Number of each row in the dataset that the user named; None where they are the same.
        """
        if isinstance(dataset, IterableDataset):
            usable, counts = drop_unusable_pairs_of_stream(dataset, rule, name)
            known = PreparedRows(name, rule, None, None, counts, dataset)
        else:
            usable, dropped, kept = drop_unusable_pairs(dataset, rule, name, numbers)
            known = PreparedRows(name, rule, kept, numbers, dropped, None)
        self._named[name] = known
        self._rows.setdefault(usable, known)  # one that was prepared before, and is passed again, keeps its way back
        return usable

    def dropped(self) -> dict[str, Counter[str]]:
        """How many pairs of each dataset were left out so far, by problem."""
        return {name: rows.dropped for name, rows in self._named.items()}

    def replace(self, dataset: Rows, by: Rows) -> None:
        """Says that a dataset has the rows of another, in the same order."""
        rows = self._rows.get(dataset)
        if rows is not None:
            self._rows[by] = rows

    def get(self, dataset: Rows) -> PreparedRows | None:
        """What is known of a dataset's rows; None if it was not prepared here."""
        return self._rows.get(dataset)

    def row(self, dataset: Rows, row: int, name: str) -> dict[str, Any]:
        """A row of a prepared dataset by its number in the dataset that the user passed.

        Raises:
            ValueError: There is no such row, or it was left out.
        """
        known = self.get(dataset)
        if isinstance(dataset, IterableDataset):
            return _row_of_stream(dataset, known, row, name)
        size = len(dataset)
        kept = np.arange(size) if known is None or known.kept is None else known.kept
        found = np.flatnonzero(kept == row)
        if not len(found):
            limit = None if known is None else known.rule.max_length
            raise ValueError(
                f"`rows`: the {name} dataset has no row {row} that can be trained on; it has {size}, the last of "
                f"them {kept.max()}, numbered from 0. Name another row; rows are dropped where a response is empty "
                f"within `max_length={limit}`, or where both are the same."
            )
        return dataset[int(found[0])]

    def find(self, dataset: Rows | None, inputs: Mapping[str, Tensor], pair: int) -> list[int]:
        """The rows of a collated pair in the dataset that the user passed: several where pairs are alike.

        Args:
            dataset: The prepared dataset that the batch was made of.
            inputs: The batch, with `input_ids` and `attention_mask` `(2B, T + 1)`.
            pair: Number of the pair in the batch.

        Returns:
            None found: an empty list, as for streams, images and datasets that were not prepared here.
        """
        known = None if dataset is None else self.get(dataset)
        if known is None or not isinstance(dataset, Dataset) or not set(TOKEN_COLUMNS) <= set(dataset.column_names):
            return []
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        other = pair + len(ids) // 2
        chosen, rejected = (ids[row][mask[row]].tolist() for row in (pair, other))
        return [known.original(row) for row in find_pair(dataset, known.rule, chosen, rejected)]


def free_name(name: str, taken: Collection[str]) -> str:
    """What an evaluation dataset is called: its name, prefixed with `eval_` until no other dataset has that name."""
    while name in taken:
        name = f"eval_{name}"
    return name


def refuse_unread_stream(dataset: Any, known: PreparedRows | None) -> None:
    """Raises a `ValueError` if all pairs of a stream that was read to its end were dropped."""
    if isinstance(dataset, IterableDataset) and known is not None and known.dropped:
        dropped = known.dropped
        raise ValueError(nothing_left(known.name, known.rule, dropped, dropped.total()))


def _row_of_stream(dataset: IterableDataset, known: PreparedRows | None, row: int, name: str) -> dict[str, Any]:
    stream = dataset if known is None or known.unfiltered is None else known.unfiltered
    rows: Iterator[dict[str, Any]] = iter(stream)
    found = next(islice(rows, row, None), None) if row >= 0 else None
    if found is None:
        raise ValueError(f"`rows`: the {name} stream has no row {row}. Rows are numbered from 0.")
    problem = None if known is None else known.rule.problem(*(found[column] for column in TOKEN_COLUMNS))
    if problem is not None:
        raise ValueError(
            f"`rows`: row {row} of the {name} stream can't be trained on: "
            + ("both responses are the same." if problem == "identical" else "a response is empty.")
            + " Name another row."
        )
    return found
