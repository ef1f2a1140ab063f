"""What an entry of a registry is: a function with its help and its source; and what an option is: one declaration.

The registries are `otpo.weighting.registry` and `otpo.transport.registry`. The fields of `OTPOConfig`, their checks,
`--help`, the parser of `otpo explain` and the table of docs/weightings.md are made from them. Nothing here imports
torch, and an entry imports its function when the function is first used, since `otpo explain --help` reads the
registries too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

from .lazy import load


@dataclass(frozen=True)
class Registered:
    """A function that options choose by its name.

    Attributes:
        function: Where the function is, as `"module:name"`, or the function.
        help: What it does, in one sentence without a full stop.
        source: Where it was published, or who chose it.
    """

    function: str | Callable[..., Any]
    help: str
    source: str

    def load(self) -> Callable[..., Any]:
        """The function; its module is imported when it was not."""
        return load(self.function)


def accept(name: str, value: Any) -> None:
    """The check of an option that may have any value."""


def always(args: Any) -> bool:
    """An option that every description of its weighting names."""
    return True


def never(args: Any) -> bool:
    """An option that no description of its weighting names."""
    return False


@dataclass(frozen=True)
class Option:
    """An option of `OTPOConfig` that a weighting takes.

    Attributes:
        field: The field's name in `OTPOConfig`.
        kind: Type of its value: `float`, `int` or `str`.
        default: The field's default.
        help: What it does and its range, for `--help`.
        keyword: The keyword of the weighting's function that gets the value. None: the trainer reads the option.
        check: Called with the name that a message shall use and the value; raises a `ValueError` that names both.
        needed: What to set where the weighting can't do without the option and it is None. Empty: None is fine.
        shown: Whether the line that describes the weighting names the option, given the `OTPOConfig`.
        shared: Whether the option also acts where no weighting takes it, such as in TRL's loss.
        own_defaults: Whether weightings may have their own defaults of it. Its field in `OTPOConfig` then is None
            until it is set.
        bundled: Whether the function gets the value in the one object that its entry makes of such options.
    """

    field: str
    kind: type
    default: Any
    help: str
    keyword: str | None = None
    check: Callable[[str, Any], None] = accept
    needed: str = ""
    shown: Callable[[Any], bool] = always
    shared: bool = False
    bundled: bool = False
    own_defaults: bool = False

    def describe(self, args: Any) -> str:
        """The option's name and its value in an `OTPOConfig`."""
        value = getattr(args, self.field)
        return f"{self.field} {value:g}" if isinstance(value, Real) else f"{self.field} {value}"


def finite(name: str, value: Any) -> None:
    """Raises a `ValueError` unless the value is a finite number; text, None and booleans are none."""
    if not _within(value, lambda number: -inf < number < inf):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")


def positive(name: str, value: Any) -> None:
    """Raises a `ValueError` unless the value is positive and finite."""
    if not _within(value, lambda number: 0.0 < number < inf):
        raise ValueError(f"`{name}` must be a positive finite number, got {value!r}.")


def at_least_one(name: str, value: Any) -> None:
    """Raises a `ValueError` unless the value is a whole number of at least 1."""
    if not _within(value, lambda number: number >= 1):
        raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    if value == inf or value != int(value):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")


def above_zero_to_one(name: str, value: Any) -> None:
    """Raises a `ValueError` unless the value is within (0, 1]."""
    if not _within(value, lambda number: 0.0 < number <= 1.0):
        raise ValueError(f"`{name}` must be within (0, 1], got {value!r}.")


def zero_to_one(name: str, value: Any) -> None:
    """Raises a `ValueError` unless the value is within [0, 1]."""
    if not _within(value, lambda number: 0.0 <= number <= 1.0):
        raise ValueError(f"`{name}` must be within [0, 1], got {value!r}.")


def zero_to_one_or_none(name: str, value: Any) -> None:
    """Raises a `ValueError` unless the value is None or within [0, 1]."""
    if value is not None:
        zero_to_one(name, value)


def _within(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value is a number that fits; text, None and booleans are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(fits(value))


def alternatives(names: Iterable[str]) -> str:
    """`'a', 'b' or 'c'`."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


def one_of(names: Iterable[str]) -> Callable[[str, Any], None]:
    """The check that a value is among names, such as those of a registry, which may grow."""

    def check(name: str, value: Any) -> None:
        if value not in list(names):
            raise ValueError(f"`{name}` must be {alternatives(names)}, got {value!r}.")

    return check
