"""Checks of instruction data before the first step: columns, answers that are missing, empty messages."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from .preferences import column_names
from .row_checks import check_rows, text_problem

Form = Literal["messages", "prompt-completion"]
_NO_ANSWER = "has no assistant turn, so there is no answer to learn"
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


def check_instructions(
    dataset: Dataset | IterableDataset, form: Form, name: str, numbers: Sequence[int] | None = None
) -> Dataset | IterableDataset:
    """The dataset, after each row was looked at; a stream's rows are looked at when they are read.

    Args:
        dataset: Rows of that form.
        form: See [`instruction_form`].
        name: What the dataset is called in messages.
        numbers: Number of each row in the dataset that the user named; None where they are the same.

    Raises:
        ValueError: Something in a row can't be learned from; the message names the row.
    """
    return check_rows(dataset, _COLUMNS[form], partial(row_problem, form=form), name, numbers, answered=True)


def row_problem(row: Mapping[str, Any], form: Form) -> str | None:
    """What is wrong with a row, None when nothing is."""
    for side in _COLUMNS[form]:
        value = row.get(side)
        if not value or (isinstance(value, str) and not value.strip()):
            return _NO_ANSWER if form == "messages" else f"has an empty {side}"
        if form == "messages" and isinstance(value, str):
            return f"has text in '{side}', which must be a list of messages"
        if side == "completion" and isinstance(value, str) != isinstance(row["prompt"], str):
            return "has text in one of 'prompt' and 'completion' and messages in the other; they must be of one form"
        problem = _empty_message(value, side) or text_problem(value, side)
        if problem is not None:
            return problem
        turns: Any = value
        if form == "messages" and not any(message["role"] == "assistant" for message in turns):
            return _NO_ANSWER
    return None


def _empty_message(messages: Any, column: str) -> str | None:
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, Mapping) or not message.get("role") or message.get("tool_calls"):
            continue
        content = message.get("content")
        if not (content.strip() if isinstance(content, str) else content):
            return f"has an empty message, number {place} ({message['role']}) of '{column}'"
    return None
