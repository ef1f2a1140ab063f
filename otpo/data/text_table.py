"""Text columns of a dataset as a whole, read from Arrow: which rows can have something wrong with them.

Nothing here loops over rows. What is found is a suspicion, on the safe side: a row's own check has the last word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset

ROWS_AT_ONCE = 10_000
pc: Any = pyarrow.compute  # whose functions are made when it is imported


def rows_to_look_at(dataset: Dataset, columns: Sequence[str], *, answered: bool = False) -> np.ndarray:
    """Numbers of the rows that may have a null, an empty text, or a message without its parts, ascending.

    Args:
        dataset: The rows.
        columns: Columns of text or of messages.
        answered: Whether rows of messages without an assistant's are among them.
    """
    found, begin = [np.empty(0, dtype=np.int64)], 0
    arrow = dataset.select_columns(list(columns)).with_format("arrow")
    for block in arrow.iter(ROWS_AT_ONCE):
        table: Any = block
        suspects = np.zeros(len(table), dtype=bool)
        # Text beside messages is one row's fault where it is every row's.
        if len({_is_text(table[name].type) for name in columns}) > 1:
            suspects[:] = True
        for name in columns:
            suspects |= _suspects(table[name].combine_chunks(), answered and name == "messages")
        found.append(begin + np.flatnonzero(suspects))
        begin += len(table)
    return np.concatenate(found)


def _suspects(column: Any, answered: bool) -> np.ndarray:
    """Which rows of a column are suspicious, `(rows,)` bool."""
    if _is_text(column.type):
        return _lacks_text(column)
    if not _is_messages(column.type):
        return np.ones(len(column), dtype=bool)
    nothing = pc.fill_null(pc.equal(pc.list_value_length(column), 0), True).to_numpy(zero_copy_only=False)
    messages = pc.list_flatten(column)
    owners = pc.list_parent_indices(column).to_numpy()
    roles, contents = messages.field("role"), messages.field("content")
    odd = _lacks_text(roles) | messages.is_null().to_numpy(zero_copy_only=False)
    odd |= _lacks_text(contents) if _is_text(contents.type) else np.ones(len(messages), dtype=bool)
    suspects = nothing.copy()
    suspects[owners[odd]] = True
    if answered:
        said = np.zeros(len(column), dtype=bool)
        said[owners[pc.fill_null(pc.equal(roles, "assistant"), False).to_numpy(zero_copy_only=False)]] = True
        suspects |= ~said
    return suspects


def _lacks_text(column: Any) -> np.ndarray:
    blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_messages(kind: Any) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return {"role", "content"} <= fields.keys() and _is_text(fields["role"])
