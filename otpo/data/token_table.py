"""Token columns of a dataset as numbers: lengths, spans and equality of many rows at once, read from Arrow.

Nothing here loops over rows. Shapes: N rows of the dataset, R rows of a block of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset

pc: Any = pyarrow.compute  # whose functions are made when it is imported

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""What TRL's tokenization of a pair makes."""
ROWS_AT_ONCE = 1000
"""Rows read together; what `datasets` writes as one block of a file."""


@dataclass(frozen=True)
class Lists:
    """A column of lists in R rows.

    Attributes:
        lengths: `(R,)` int64.
        values: The lists' values one after another, `(sum of lengths,)`.
    """

    lengths: np.ndarray
    values: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each row's list starts among the values, `(R,)`."""
        return np.cumsum(self.lengths) - self.lengths


def blocks(dataset: Dataset, columns: Sequence[str]) -> Iterator[dict[str, Lists]]:
    """The lists of some columns, block by block, in the order of the rows."""
    for batch in _arrow_batches(dataset, columns):
        yield {name: _as_lists(batch[name]) for name in columns}


def column_lengths(dataset: Dataset, columns: Sequence[str]) -> list[np.ndarray]:
    """The length of each row's list in each of the columns, `(N,)` int64; tokens are not read."""
    parts = [[_lengths(batch[name]) for name in columns] for batch in _arrow_batches(dataset, columns)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def rows_with_equal_spans(
    dataset: Dataset, columns: tuple[str, str], rows: np.ndarray, firsts: tuple[np.ndarray, np.ndarray], n: np.ndarray
) -> np.ndarray:
    """Those of `rows` whose two columns hold the same values in a span.

    Args:
        dataset: N rows.
        columns: Names of the two columns.
        rows: Rows to look at, `(R,)`.
        firsts: Index of the span's first value in each column's list, `(R,)` each.
        n: Values in the span, at least 1, `(R,)`.
    """
    found = [np.empty(0, dtype=np.int64)]
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        lists = next(blocks(dataset.select(rows[part]), columns))
        values = [
            lists[name].values[_ranges(lists[name].starts + first[part], n[part])]
            for name, first in zip(columns, firsts, strict=True)
        ]
        begins = np.cumsum(n[part]) - n[part]
        differing = np.add.reduceat(values[0] != values[1], begins, dtype=np.int64)
        found.append(rows[part][differing == 0])
    return np.concatenate(found)


def rows_with_sequences(
    dataset: Dataset, columns: Sequence[tuple[str, str]], firsts: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
) -> np.ndarray:
    """The rows in which two joined columns go on with the wanted values from a given place on, for several twos.

    Args:
        dataset: N rows.
        columns: Names of two columns whose lists are joined, such as a prompt's and a completion's.
        firsts: For each two, where in the joined list the wanted values start, `(N,)`; below 0 for rows that are out.
        wanted: For each two, the values that follow there, `(L,)`.
    """
    found = []
    begin = 0
    for lists in blocks(dataset, sorted({name for two in columns for name in two})):
        size = len(next(iter(lists.values())).lengths)
        rows = np.arange(size)
        for two, first, values in zip(columns, firsts, wanted, strict=True):
            first = first[begin : begin + size]
            rows = rows[first[rows] >= 0]
            # A look at one place leaves few rows to be compared as a whole.
            for places in (np.arange(len(values))[-1:], np.arange(len(values))):
                read = _joined_values(lists[two[0]], lists[two[1]], rows, first[rows, None] + places)
                rows = rows[(read == values[places]).all(1)]
        found.append(begin + rows)
        begin += size
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _joined_values(left: Lists, right: Lists, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values at `places` `(R, P)` of the rows' joined lists."""
    lengths = left.lengths[rows, None]
    in_left = places < lengths
    read = np.empty(places.shape, dtype=np.result_type(left.values, right.values))
    read[in_left] = left.values[(left.starts[rows, None] + places)[in_left]]
    read[~in_left] = right.values[(right.starts[rows, None] + places - lengths)[~in_left]]
    return read


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...` of each row, one after another."""
    begins = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - begins, lengths)


def _arrow_batches(dataset: Dataset, columns: Sequence[str]) -> Iterator[Any]:
    yield from dataset.select_columns(list(columns)).with_format("arrow").iter(ROWS_AT_ONCE)


def _lengths(column: Any) -> np.ndarray:
    return pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)


def _as_lists(column: Any) -> Lists:
    values = pc.list_flatten(column).to_numpy()
    return Lists(_lengths(column), values)
