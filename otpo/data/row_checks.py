"""What a row of preference pairs or instructions must be: text, or messages with a role and something said."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from .preferences import RowError, has_tokens_alone, require_preference_columns
from .text_table import rows_to_look_at

RowProblem = Callable[[Mapping[str, Any]], str | None]
"""What is wrong with a row, as the end of a sentence; None when nothing is."""


def check_rows(
    dataset: Dataset | IterableDataset,
    columns: Sequence[str],
    problem: RowProblem,
    name: str,
    numbers: Sequence[int] | None = None,
    *,
    answered: bool = False,
) -> Dataset | IterableDataset:
    """The dataset, after its rows were looked at; a stream's rows are looked at when they are read.

    Columns as a whole show which rows can have a problem at all; only those are looked at one by one.

    Args:
        dataset: The rows.
        columns: Columns that `problem` looks at; the others are not read.
        problem: Tells what is wrong with a row.
        name: What the dataset is called in messages.
        numbers: Number of each row in the dataset that the user named; None where they are the same.
        answered: Whether messages without an assistant's are a problem.

    Raises:
        ValueError: Something is wrong with a row; the message names it.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(_RowCheck(problem, name), with_indices=True)
    for index in rows_to_look_at(dataset, columns, answered=answered):
        row: Any = dataset[int(index)]
        _refuse(problem(row), int(index if numbers is None else numbers[index]), name)
    return dataset


def check_pairs(
    dataset: Dataset | IterableDataset, name: str, numbers: Sequence[int] | None = None
) -> Dataset | IterableDataset:
    """[`check_rows`] for preference pairs; those that are tokenized are taken as they are.

    Raises:
        ValueError: There are no rows, a column is missing, or something is wrong with a row.
    """
    require_preference_columns(dataset, name)
    columns = dataset.column_names or ()
    if has_tokens_alone(columns):
        return dataset
    asked = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    return check_rows(dataset, asked, pair_problem, name, numbers)


def pair_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a preference pair: `chosen`, `rejected` and perhaps `prompt`, of one form.

    Empty texts are no fault here: the trainer drops and counts such responses. Rows of tokens have no text to look at.
    """
    if has_tokens_alone(row):
        return None
    sides = [side for side in ("prompt", "chosen", "rejected") if side in row or side != "prompt"]
    for side in sides:
        problem = text_problem(row.get(side), side)
        if problem is not None:
            return problem
    texts = [side for side in sides if isinstance(row[side], str)]
    if texts and len(texts) < len(sides):
        lists = [side for side in sides if side not in texts]
        return f"has text in {_listed(texts)} and messages in {_listed(lists)}; they must be of one form"
    for side in () if texts else sides:
        if not row[side]:
            return f"has no messages in '{side}'"
    return None


def text_problem(value: Any, column: str) -> str | None:
    """What is wrong with a column's value, which is to be text or a list of messages."""
    if value is None:
        return f"has no '{column}': it is null or absent"
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"has {_shown(value)} in '{column}', which must be text or a list of messages"
    for place, message in enumerate(value):
        problem = message_problem(message, f"number {place} of '{column}'")
        if problem is not None:
            return problem
    return None


def message_problem(message: Any, where: str) -> str | None:
    """What is wrong with the message that is there: a mapping with a `role`, and `content` unless `tool_calls`."""
    if not isinstance(message, Mapping):
        return f"has {_shown(message)} as message {where}, which must be a mapping with 'role' and 'content'"
    role, content = message.get("role"), message.get("content")
    if not role or not isinstance(role, str):
        found = "without a role" if role in (None, "") else f"whose role is {_shown(role)} and must be text"
        return f"has a message {found}, {where}"
    if content is None:
        return None if message.get("tool_calls") else f"has a message without content ({role}), {where}"
    parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    if not isinstance(content, str) and not parts:
        return (
            f"has a message ({role}) whose content is {_shown(content)} and must be text or a list of parts, {where}"
        )
    return None


class _RowCheck:
    """The check as a map over a stream."""

    def __init__(self, problem: RowProblem, name: str) -> None:
        self.problem, self.name = problem, name

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        _refuse(self.problem(row), index, self.name)
        return row


def _refuse(problem: str | None, index: int, name: str) -> None:
    if problem is not None:
        raise RowError(
            f"Row {index} of the {name} dataset {problem}. Mend or remove such rows, for instance with "
            "`dataset.filter`."
        )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
