"""Docstrings as the site needs them: names in brackets, such as [`PairBatch`], become links where it has a place."""

import re
from typing import Any

import griffe

NAME = re.compile(r"\[`([\w.]+)`\](?:\[([\w.]+)\])?(?![\[(])")


class DocstringLinks(griffe.Extension):
    """A griffe extension; mkdocstrings loads it by its path."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replaces the names in one object's docstring; names that no page documents stay code."""
        if obj.docstring is None:
            return
        text = NAME.sub(lambda match: _link(obj, match[1], match[2]), obj.docstring.value)
        # transformers makes dataclasses of configurations, which griffe can't see: it finds attributes there alone.
        if obj.is_class and "__init__" not in obj.members and "dataclass" not in obj.labels:
            text = text.replace("\nArgs:\n", "\nAttributes:\n")
        obj.docstring.value = text


def _link(obj: griffe.Object, name: str, target: str | None) -> str:
    path = target or name
    try:
        path = obj.resolve(path)
    except griffe.NameResolutionError:
        inner = f"{obj.path}.{name}"
        path = inner if name in obj.members else path
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
