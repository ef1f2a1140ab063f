"""Makes the numbers of tokens that weightings look at of a dataset's rows, once, before training.

A prepared row holds them as lists, a number for each token that is scored after truncation, as it holds the stored
log-probabilities of the reference. So they follow truncation, need no work in the training step and reach any layout.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from transformers import ProcessorMixin

from otpo.version import __version__
from otpo.weighting.token_values import TokenValues

from .preferences import TOKEN_COLUMNS, PairRule, RowError

Rows = Dataset | IterableDataset


def unmatched(token_ids: Sequence[int], other_ids: Sequence[int]) -> NDArray[np.float32]:
    """One for the tokens that a plain diff does not find in the other response, zero for the rest, `(n,)`."""
    return unmatched_sides(token_ids, other_ids)[0]


def unmatched_sides(
    chosen_ids: Sequence[int], rejected_ids: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same of both responses by one alignment: matched tokens are as many in one as in the other.

    The alignment is `difflib`'s, by the longest runs of equal tokens first (Ratcliff and Obershelp).
    """
    sides = np.ones(len(chosen_ids), np.float32), np.ones(len(rejected_ids), np.float32)
    for block in SequenceMatcher(None, chosen_ids, rejected_ids, autojunk=False).get_matching_blocks():
        sides[0][block.a : block.a + block.size] = 0.0
        sides[1][block.b : block.b + block.size] = 0.0
    return sides


def unmatched_tokens(row: Mapping[str, Any], rule: PairRule, tokenizer: Any) -> tuple[Any, Any]:
    """[`unmatched_sides`] of what is scored: a token whose partner is cut off by truncation has none."""
    chosen, rejected = (scored_part(row, side, row[f"{side}_ids"], rule) for side in ("chosen", "rejected"))
    return unmatched_sides(chosen, rejected)


def scored_part(row: Mapping[str, Any], side: str, values: Any, rule: PairRule) -> Any:
    """Of a value of each completion token those that are scored after truncation."""
    first, count = rule.scored(len(row["prompt_ids"]), len(row[f"{side}_ids"]))
    return values[first : first + count]


def with_token_values(
    dataset: Rows,
    kinds: Sequence[TokenValues],
    rule: PairRule,
    tokenizer: Any,
    name: str,
    *,
    numbers: NDArray[np.int64] | None = None,
    processes: int | None = None,
    first: AbstractContextManager[Any],
) -> Rows:
    """A tokenized dataset or stream with columns of numbers of its tokens; of a stream made while it is read.

    Args:
        dataset: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        kinds: What is made.
        rule: How pairs are truncated.
        tokenizer: Which the tokens are of.
        name: What the dataset is called in messages.
        numbers: Number of each row in the dataset that the user named; None where they are the same.
        processes: How many share the work on a dataset; None for this one.
        first: Around the work on a dataset: the others wait for the first process, and find what it has stored.

    Raises:
        ValueError: A column that is read is missing.
        RowError: A row can't be used; the message names it.
    """
    if not kinds:
        return dataset
    require_columns(dataset, kinds, name)
    asked = tokenizer if any(kind.needs_tokenizer for kind in kinds) else None
    make = _Values(tuple(kinds), rule, asked, name, numbers)
    if isinstance(dataset, IterableDataset):
        return dataset.map(make, with_indices=True)
    with first:
        described = f"Values of tokens of the {name} dataset"
        return dataset.map(make, with_indices=True, num_proc=processes, desc=described)


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer, which a processor of images has in it."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class  # pyright: ignore[reportAttributeAccessIssue]


def code_of(function: Any) -> str | None:
    """A hash of the file that a callable's module is of, which holds its code and the constants that it reads.

    None where there is no file, and for a script or a notebook, whose functions `datasets` hashes whole.
    """
    while isinstance(function, partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _Values:
    """Makes the columns of a row."""

    def __init__(
        self,
        kinds: tuple[TokenValues, ...],
        rule: PairRule,
        tokenizer: Any,
        name: str,
        numbers: NDArray[np.int64] | None,
    ) -> None:
        self.kinds, self.rule, self.tokenizer, self.name, self.numbers = kinds, rule, tokenizer, name, numbers
        # What `datasets` stores is found again by what this object holds. It knows functions by their names alone.
        self.version = __version__
        self.code = [code_of(kind.load()) for kind in kinds]

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for kind in self.kinds:
            try:
                sides = kind.load()(row, self.rule, self.tokenizer)
            except ValueError as error:
                number = index if self.numbers is None else self.numbers[index]
                raise RowError(f"Row {number} of the {self.name} dataset{_reader()} {error}") from error
            made |= {column: np.asarray(side, np.float32) for column, side in zip(kind.columns, sides, strict=True)}
        return made


def _reader() -> str:
    """Who read the row, where several workers share a stream and each one counts its own rows."""
    worker = get_worker_info()
    return "" if worker is None else f", as worker {worker.id} of {worker.num_workers} read it,"


def require_columns(dataset: Rows, kinds: Sequence[TokenValues], name: str) -> None:
    """Refuses a dataset that lacks a column of the user's that numbers of tokens are made of.

    Args:
        dataset: Rows, tokenized or not. A stream that does not tell its columns passes.
        kinds: What is made.
        name: What the dataset is called in the message.

    Raises:
        ValueError: It lacks one; the message has them and the user's columns.
    """
    columns = dataset.column_names
    for kind in kinds if columns is not None else ():
        missing = [column for column in kind.reads if column not in (columns or ())]
        if missing:
            raise ValueError(
                f"The weighting reads the columns {list(kind.reads)}, and the {name} dataset lacks {missing}; it has "
                f"{sorted(set(columns or ()) - set(TOKEN_COLUMNS))}. Add them, or set another `weighting`."
            )
