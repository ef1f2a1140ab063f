"""Checks of instruction data before the first step: columns, answers that are missing, empty messages."""

from collections.abc import Mapping
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from .token_table import ROWS_AT_ONCE
from .validation import column_names

Form = Literal["messages", "prompt-completion"]
# TRL takes the first that is there.
_COLUMNS: dict[Form, list[str]] = {"prompt-completion": ["prompt", "completion"], "messages": ["messages"]}


def instruction_form(dataset: Dataset | IterableDataset, name: str) -> Form:
    """Which of TRL's two forms of instructions the dataset has; `prompt` and `completion` go before `messages`.

    Raises:
        ValueError: It has neither, or no rows.
    """
    columns = column_names(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} dataset has no rows.")
    for form, needed in _COLUMNS.items():
        if set(needed) <= set(columns):
            return form
    remedy = "rename yours with `dataset.rename_column(old, new)`"
    if "conversations" in columns:
        remedy = "turn 'conversations' into them with `dataset.map(trl.data_utils.maybe_convert_to_chatml)`"
    elif "text" in columns:
        remedy = "pretrain on a 'text' column with `otpo pretrain`"
    elif "chosen" in columns:
        remedy = "align on preference pairs with `otpo align`"
    raise ValueError(
        f"The {name} dataset has the columns {sorted(columns)}. Instructions need 'messages', or 'prompt' and "
        f"'completion': {remedy}."
    )


def is_conversational(row: Mapping[str, Any], form: Form) -> bool:
    """Whether a row of that form holds messages rather than plain text."""
    return form == "messages" or not isinstance(row["prompt"], str)


def check_instructions(dataset: Dataset | IterableDataset, form: Form, name: str) -> Dataset | IterableDataset:
    """The dataset, after each row was looked at; a stream's rows are looked at when they are read.

    Raises:
        ValueError: Something in a row can't be learned from; the message names the row.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(_RowCheck(form, name), with_indices=True)
    index = 0
    for batch in dataset.select_columns(_COLUMNS[form]).iter(ROWS_AT_ONCE):
        columns: dict[str, list[Any]] = dict(batch)  # pyright: ignore
        for values in zip(*columns.values(), strict=True):
            _refuse(dict(zip(columns, values, strict=True)), form, index, name)
            index += 1
    return dataset


def row_problem(row: Mapping[str, Any], form: Form) -> str | None:
    """What is wrong with a row, None when nothing is."""
    if form == "messages":
        messages = row["messages"] or []
        if not any(message["role"] == "assistant" for message in messages):
            return "has no assistant turn, so there is no answer to learn"
        return _empty_message(messages, "messages")
    for side in ("prompt", "completion"):
        text = row[side]
        if not text or (isinstance(text, str) and not text.strip()):
            return f"has an empty {side}"
        problem = None if isinstance(text, str) else _empty_message(text, side)
        if problem is not None:
            return problem
    return None


def _empty_message(messages: list[Mapping[str, Any]], column: str) -> str | None:
    for place, message in enumerate(messages):
        content = message.get("content")
        said = content.strip() if isinstance(content, str) else content
        if not said and not message.get("tool_calls"):
            return f"has an empty message, number {place} ({message['role']}) of '{column}'"
    return None


def _refuse(row: Mapping[str, Any], form: Form, index: int, name: str) -> None:
    problem = row_problem(row, form)
    if problem is not None:
        raise ValueError(
            f"Row {index} of the {name} dataset {problem}. Mend or remove such rows, for instance with "
            "`dataset.filter`."
        )


class _RowCheck:
    """The check as a map over a stream."""

    def __init__(self, form: Form, name: str) -> None:
        self.form: Form = form
        self.name = name

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        _refuse(row, self.form, index, self.name)
        return row
