"""Weightings that are callables: what numbers of tokens one looks at, and whether two are the same."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

from otpo.transport.options import TransportOptions

from .registry import WEIGHTINGS
from .token_values import TokenValues


def values_of_callable(weighting: Callable[..., Any]) -> tuple[TokenValues, ...]:
    """The numbers of tokens that a callable looks at and that are made of the data, each once.

    Those of the registry's entry for its function, also where `functools.partial` sets its keywords or a product has
    it as a factor, and those in an attribute `token_values` of the callable.

    Raises:
        TypeError: The attribute is no sequence of [`TokenValues`].
    """
    named = getattr(weighting, "token_values", ())
    if not isinstance(named, Sequence) or not all(isinstance(each, TokenValues) for each in named):
        raise TypeError(f"`token_values` of a weighting must be a tuple of `TokenValues`, got {named!r}.")
    found = [*named, *(value for kind in WEIGHTINGS.values() if _is_of(weighting, kind) for value in kind.values)]
    if isinstance(weighting, partial):
        for part in (weighting.func, *weighting.keywords.get("factors", ())):
            found += values_of_callable(part)
    return tuple(dict.fromkeys(found))


def same_weighting(one: Any, other: Any) -> bool:
    """Whether two weightings are the same function with the same keywords; of what can't be compared, False."""
    if isinstance(one, partial) and isinstance(other, partial):
        return all(
            same_weighting(*each)
            for each in ((one.func, other.func), (one.args, other.args), (one.keywords, other.keywords))
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_weighting(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_weighting, one, other))
    plain = (Real, str, TransportOptions)
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)


def _is_of(weighting: Any, kind: Any) -> bool:
    """Whether a callable is an entry's function, which is not imported for that."""
    if callable(kind.function):
        return weighting is kind.function
    name = getattr(weighting, "__qualname__", None)
    return name is not None and f"{getattr(weighting, '__module__', None)}:{name}" == kind.function
