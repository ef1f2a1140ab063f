"""Dataclasses that users fill in by YAML: what each field may hold stands beside it, and one function checks it.

A message names the field by its path in the file, such as `stages[1].sources[0].weight`.
"""

import math
import re
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
    NoneType: "left out",
}
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""A number to everyone but YAML 1.1, which wants a point and a sign in it and takes `3e-4` for text."""


@dataclass(frozen=True)
class Limits:
    """What a field may hold beside its type.

    Attributes:
        least: A number's lower end.
        above: What a number must be above.
        choices: What a text may be; none for anything.
        form: The pattern of a text, and how it is described.
        empty: Whether a list, a mapping or a text may be empty.
    """

    least: float | None = None
    above: float | None = None
    choices: Collection[str] = ()
    form: tuple[str, str] | None = None
    empty: bool = False


def limits(**values: Any) -> dict[str, Limits]:
    """The metadata of a dataclass's field with [`Limits`]."""
    return {"limits": Limits(**values)}


class FieldError(ValueError):
    """A field of a dataclass that holds what it may not.

    Attributes:
        name: The field, or its path from the dataclass on.
        problem: What is wrong with it.
    """

    def __init__(self, owner: Any, name: str, problem: str):
        super().__init__(f"`{type(owner).__name__}.{name}` {problem}")
        self.name = name
        self.problem = problem


def check_fields(instance: Any) -> None:
    """Raises a [`FieldError`] for the first field of a dataclass that is not of its type or within its [`Limits`]."""
    hints = get_type_hints(type(instance))
    for entry in fields(instance):
        allowed = entry.metadata.get("limits", Limits())
        problem = _find_problem(getattr(instance, entry.name), _kinds_of(hints[entry.name]), allowed)
        if problem:
            raise FieldError(instance, entry.name, problem)


def build(kind: Any, values: Any, path: str = "") -> Any:
    """The dataclass `kind` of a mapping, whose lists of mappings become lists of dataclasses where `kind` says so.

    Args:
        kind: A dataclass that calls [`check_fields`] when it is made.
        values: What YAML or JSON read.
        path: Of `values` in the file, for messages.

    Raises:
        ValueError: A name is unknown or missing, or a value is not what it may be; the message names its path.
    """
    label = kind.__name__.lower()
    where = f"`{path}`: " if path else ""
    known = [entry.name for entry in fields(kind)]
    if not isinstance(values, dict):
        raise ValueError(f"{where}a {label} must be a mapping with {known}, got {values!r:.60}.")
    unknown = [name for name in values if name not in known]
    if unknown:
        near = get_close_matches(str(unknown[0]), known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"{where}a {label} has no {unknown}; there are {known}.{hint}")
    missing = [
        entry.name
        for entry in fields(kind)
        if entry.name not in values and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}a {label} is incomplete: it needs {missing}.")
    hints = get_type_hints(kind)
    made = {name: _make(hints[name], value, _join(path, name)) for name, value in values.items()}
    try:
        return kind(**made)
    except FieldError as error:
        raise ValueError(f"`{_join(path, error.name)}` {error.problem}") from None


def _make(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) is list and is_dataclass(get_args(hint)[0]) and isinstance(value, list):
        return [build(get_args(hint)[0], item, f"{path}[{place}]") for place, item in enumerate(value)]
    kinds = _kinds_of(hint)
    if float in kinds and isinstance(value, str):
        return _number(value)
    if dict in kinds and isinstance(value, dict):
        return _with_numbers(value)
    return value


def _with_numbers(value: Any) -> Any:
    """A mapping or list whose texts that are numbers with an exponent are numbers."""
    if isinstance(value, dict):
        return {name: _with_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    return _number(value) if isinstance(value, str) else value


def _number(text: str) -> float | str:
    return float(text) if _EXPONENT.fullmatch(text) else text


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _kinds_of(hint: Any) -> list[type]:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_origin(part) or part for part in parts]


def _find_problem(value: Any, kinds: Collection[type], allowed: Limits) -> str | None:
    if not any(_is_of(value, kind) for kind in kinds):
        return f"must be {' or '.join(_KINDS[kind] for kind in kinds)}, got {value!r:.60}."
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not _is_finite(value):
            return f"must be a finite number, got {value!r:.60}."
        if allowed.least is not None and value < allowed.least:
            return f"must be at least {allowed.least:g}, got {value}."
        if allowed.above is not None and not value > allowed.above:
            return f"must be above {allowed.above:g}, got {value}."
    text = value.strip() if isinstance(value, str) else None
    if not allowed.empty and (text == "" or (isinstance(value, list | dict) and not value)):
        return "must not be empty."
    if not isinstance(value, str):
        return None
    if allowed.choices and value not in allowed.choices:
        near = get_close_matches(value, allowed.choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"must be one of {', '.join(allowed.choices)}, got {value!r}.{hint}"
    if allowed.form and not re.fullmatch(allowed.form[0], value):
        return f"must be {allowed.form[1]}, got {value!r:.60}."
    return None


def _is_of(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
