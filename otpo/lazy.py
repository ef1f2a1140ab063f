"""Names that are imported when they are first touched, so that looking at a package or at `--help` costs no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def load(home: str | Callable[..., Any]) -> Any:
    """A function that is named by its module, or the function that is given.

    Args:
        home: `"module:name"`, or a function.

    Raises:
        ImportError: There is no such module.
        AttributeError: The module has no such name.
    """
    if not isinstance(home, str):
        return home
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports its public names from their modules.

    Args:
        package: The package's `__name__`.
        homes: Module of each public name.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return load(f"{homes[name]}:{name}")

    return find
