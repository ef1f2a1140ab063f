"""Other attribute values for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(target: Any, **values: Any) -> Iterator[None]:
    """Gives an object's attributes other values inside the block; those it did not hold itself are taken off again."""
    held = {name: value for name, value in vars(target).items() if name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in held:
                setattr(target, name, held[name])
            else:
                delattr(target, name)
