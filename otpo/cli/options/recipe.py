"""Recipes: options in a YAML file, each of the type that its dataclass gives it."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_TAKE_FILES = {"deepspeed", "fsdp_config", "accelerator_config"}  # mappings, or files that hold one
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_UNUSABLE = object()


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a name that stands twice in a mapping, of which it would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """The mapping of a node."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"`{key.value}` stands there twice. Leave one out"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(option: str, path: str) -> Any:
    """The content of a YAML file.

    Args:
        option: How the option that names the file is written in messages.
        path: The file.

    Raises:
        ValueError: It can't be read or is no YAML; the message names the line and column.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"`{option} {path}` is a folder. Name the YAML file in it.")
    if not file.is_file():
        raise ValueError(f"`{option} {path}`: there is no such file.")
    content = b""
    try:
        content = file.read_bytes()
        return yaml.load(content.decode("utf-8-sig"), _Loader)
    except OSError as error:
        raise ValueError(f"`{option} {path}` can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"`{option} {path}`, line {line}, column {column}: the file is not UTF-8 text. Save it as UTF-8."
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"`{option} {path}`{place}: no valid YAML: {error.problem or error.context}.") from error
    except yaml.reader.ReaderError as error:
        text = content.decode("utf-8-sig")[: error.position]
        line, column = text.count("\n") + 1, error.position - text.rfind("\n")
        raise ValueError(
            f"`{option} {path}`, line {line}, column {column}: the character {chr(error.character)!r} can't stand in "  # pyright: ignore
            "YAML. Remove it."
        ) from error


def read_recipe(path: str) -> dict[str, Any]:
    """The options of a recipe as they stand there, `env` among them.

    Raises:
        ValueError: It can't be read or is no mapping of names.
    """
    recipe = read_yaml("--config", path)
    if recipe is None:
        raise ValueError(f"`--config {path}` is empty. A recipe is a YAML mapping of options to values.")
    if not isinstance(recipe, dict):
        raise ValueError(f"`--config {path}`: a recipe is a YAML mapping of options to values, got {recipe!r:.60}.")
    for name in recipe:
        if not isinstance(name, str):
            raise ValueError(f"`--config {path}`: {name!r} is no name of an option. Put quotes around text.")
    env = recipe.get("env")
    if env is not None and not isinstance(env, dict):
        raise ValueError(f"`--config {path}`: `env` must be a mapping of variables to values, got {env!r:.60}.")
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in f"{name}{value}":
            raise ValueError(f"`--config {path}`: `env` has {name!r}, which is no name of a variable with its value.")
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"`--config {path}`: `{name}: {_shown(value)}` in `env` is of the wrong type. A variable is text, a "
                "number, true or false."
            )
    return recipe


def option_types(dataclasses: Iterable[Any]) -> dict[str, Any]:
    """The type of each option of some dataclasses, as it is written there; the first that has a name gives it."""
    types: dict[str, Any] = {}
    for kind in dataclasses:
        for name, hint in get_type_hints(kind).items():
            types.setdefault(name, hint)
    return types


def conform(recipe: Mapping[str, Any], types: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The recipe with values of the options' types: `1` for text is "1", one value for a list is a list of it.

    Text for anything but text is left to the parser of the command line, which reads it as if it were typed there.

    Raises:
        ValueError: A value is of another type; the message names option, value and what is expected.
    """
    conformed = {}
    for name, value in recipe.items():
        conformed[name] = _as(value, types[name]) if name in types else value
        if conformed[name] is _UNUSABLE:
            raise ValueError(
                f"`--config {path}`: `{name}: {_shown(value)}` is of the wrong type. `{name}` is "
                f"{_expected(types[name])}."
            )
    return conformed


def require_choices(recipe: Mapping[str, Any], choices: Mapping[str, Collection[Any]], path: str) -> None:
    """Raises a `ValueError` for a value that is not among its option's choices, which argparse only asks of words."""
    for name, known in choices.items():
        if recipe.get(name) is not None and recipe[name] not in known:
            raise ValueError(
                f"`--config {path}`: `{name}: {_shown(recipe[name])}` is not known. Set one of: "
                f"{', '.join(map(str, known))}."
            )


def require_json(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the option whose value is text where a mapping, as JSON, is wanted."""
    for name, value in values.items():
        if not isinstance(value, str) or dict not in map(_origin, _members(types.get(name))):
            continue
        if name in _TAKE_FILES and not value.startswith("{"):
            continue
        if name == "fsdp":
            continue
        try:
            content = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{name}={value}` is no JSON: {error.msg} at column {error.colno}. Write a mapping, such as "
                "'{\"name\": 1}'."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"`{name}={value}` is no mapping. Write one as JSON, such as '{{\"name\": 1}}'.")


def _origin(hint: Any) -> Any:
    """`dict` of `dict[str, int]`, and of `dict`."""
    return get_origin(hint) or hint


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _as(value: Any, hint: Any) -> Any:
    """The value as one of that type; `_UNUSABLE` if it is none."""
    members = _members(hint)
    for found in (_exactly(value, member) for member in members):
        if found is not _UNUSABLE:
            return found
    if value is False and "no" in _choices(members):
        return "no"  # which YAML reads as false
    if isinstance(value, str):
        # Parsed later as a word of the command line is, unless lists or mappings alone are taken.
        lists = [member for member in members if _origin(member) is list]
        if lists:
            return _as([value], lists[0])
        parsed = [member for member in members if member is not NoneType and _origin(member) is not dict]
        return _UNUSABLE if not parsed or is_dataclass(parsed[0]) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if str in members:
            return str(value)
        lists = [member for member in members if _origin(member) is list]
        return _as([value], lists[0]) if lists else _UNUSABLE
    return _UNUSABLE


def _exactly(value: Any, hint: Any) -> Any:
    """The value if it is of a type that is no union."""
    kind = _origin(hint)
    if kind is Any:
        return value
    if kind is Literal:
        return value if value in get_args(hint) else _UNUSABLE
    if kind is list:
        if not isinstance(value, list):
            return _UNUSABLE
        items = [_item(item, (get_args(hint) or (Any,))[0]) for item in value]
        return _UNUSABLE if any(item is _UNUSABLE for item in items) else items
    if is_dataclass(kind):
        return value if isinstance(value, dict) and _fits(value, kind) else _UNUSABLE
    if kind is float:
        return value if isinstance(value, int | float) and not isinstance(value, bool) else _UNUSABLE
    if kind is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else _UNUSABLE
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value if value in _choices((kind,)) else _UNUSABLE
    return value if isinstance(kind, type) and isinstance(value, kind) else _UNUSABLE


def _item(value: Any, hint: Any) -> Any:
    """An item of a list, which no parser reads later, so numbers in text are read here."""
    if isinstance(value, str) and hint in (int, float):
        try:
            return hint(value)
        except ValueError:
            return _UNUSABLE
    return _as(value, hint)


def _fits(value: Mapping[str, Any], kind: Any) -> bool:
    types = get_type_hints(kind)
    needed = {entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING}
    if not needed <= set(value) <= set(types):
        return False
    return all(
        any(_exactly(content, member) is not _UNUSABLE for member in _members(types[name]))
        for name, content in value.items()
    )


def _choices(members: Iterable[Any]) -> list[Any]:
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    literals = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return [*literals, *(entry.value for kind in enums for entry in kind)]


def _expected(hint: Any) -> str:
    """What a type takes, in words."""
    members = _members(hint)
    words = []
    for member in members:
        kind = _origin(member)
        if kind is list:
            words.append(f"a list whose items are each {_expected((get_args(member) or (str,))[0])}")
        elif kind is dict:
            words.append("a mapping")
        elif is_dataclass(kind):
            words.append(f"a mapping with names among {[entry.name for entry in fields(kind)]}")
        elif _choices((member,)):
            words.append(f"one of {_choices((member,))}")
        else:
            words.append(_NAMES.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(sorted(set(words), key=lambda word: (word != "null", words.index(word))))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
