"""The numbers that rows have in the dataset that the user named, where a command takes some of them, in any order.

A trainer counts the rows that it is given; what it says of one is to name the user's.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset, IterableDataset

Rows = Dataset | IterableDataset
_NUMBERS: WeakKeyDictionary[Rows, np.ndarray] = WeakKeyDictionary()


def remember_numbers(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Notes the number of each row in the user's dataset, as long as this dataset itself is there; hands it on."""
    _NUMBERS[rows] = np.asarray(numbers)
    return rows


def numbers_of(rows: Rows) -> np.ndarray | None:
    """What was noted of this very dataset, not of one made of it; None where rows have the numbers that they have."""
    return _NUMBERS.get(rows)
