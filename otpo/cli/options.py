"""The options of `otpo align`: the parser, recipes, and what of a command line is the launcher's."""

import argparse
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, TrlParser

from otpo import OTPOConfig

from .loading import DataArguments

_DESCRIPTION = """\
Align a model on preference pairs, its tokens weighted by optimal transport (OTPO).

  otpo align --model_name_or_path MODEL --dataset_name otpo/demo --output_dir runs/first
  otpo align --config RECIPE.yaml --ot_reg 0.1
  otpo align --config RECIPE.yaml --accelerate_config zero3 --num_processes 4
  accelerate launch -m otpo.cli.align --config RECIPE.yaml

--config RECIPE.yaml reads options from a file; those of the command line win. --accelerate_config takes a file, or
single_gpu, ddp, zero2, zero3 or fsdp2, or a name of TRL's. It and any other option of `accelerate launch` make the
command launch itself that way; without one, it runs in this process. OTPO_TRACEBACK=1 in the environment shows where
an error comes from.
"""
_METAVARS = {int: "N", float: "X", str: "TEXT"}


@dataclass
class AlignArguments(DataArguments):
    """What `otpo align` does around the training.

    Parameters:
        report: Path of a JSON file with the last metrics, versions, device and options of the run.
    """

    report: str | None = field(
        default=None,
        metadata={
            "help": "Path of a JSON file to write: last metrics, versions, device, duration, and the options that "
            "differ from the defaults."
        },
    )


@dataclass
class Given:
    """A command line that has been read but not checked.

    Attributes:
        values: Value of each option of ours, defaults included.
        arguments: The command line less its `--config`, for the parser whose defaults are the recipe's.
        launcher: Options that are not ours, from the command line.
        recipe_launcher: The same from the recipe.
    """

    values: dict[str, Any]
    arguments: list[str]
    launcher: list[str]
    recipe_launcher: list[str]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class GroupedParser(TrlParser):
    """`TrlParser` whose help has the options in groups, those of otpo first, with short placeholders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._groups: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    def add_argument(self, *name_or_flags: str, **kwargs: Any) -> argparse.Action:
        """Adds an option to the group of its dataclass."""
        title = _TITLE_OF.get(kwargs.get("dest", name_or_flags[0].lstrip("-")))
        if title is None:
            return super().add_argument(*name_or_flags, **kwargs)
        if "action" not in kwargs and "choices" not in kwargs:
            placeholder = "BOOL" if kwargs.get("nargs") == "?" else _METAVARS.get(kwargs["type"], "VALUE")
            kwargs.setdefault("metavar", placeholder)
        if not self._groups:
            self._groups = {name: self.add_argument_group(name) for name, _ in _GROUPS}
        return self._groups[title].add_argument(*name_or_flags, **kwargs)


# The first group that has a name takes it.
_GROUPS: list[tuple[str, list[type]]] = [
    ("token weights (otpo)", [OTPOConfig]),
    ("data and run", [AlignArguments, DataArguments, ScriptArguments, DatasetMixtureConfig]),
    ("model and adapters", [ModelConfig]),
    ("preference loss (TRL)", [DPOConfig]),
    ("training (transformers)", list(OTPOConfig.__mro__[2:-1])),
]
_TITLE_OF: dict[str, str] = {}
for _title, _owners in _GROUPS:
    for _owner in _owners:
        for _name in inspect.get_annotations(_owner):
            _TITLE_OF.setdefault(_name, _title)


def make_parser(prog: str = "otpo align") -> TrlParser:
    """The parser of [`AlignArguments`], [`OTPOConfig`], `ModelConfig` and `DatasetMixtureConfig`, in this order."""
    return GroupedParser(
        (AlignArguments, OTPOConfig, ModelConfig, DatasetMixtureConfig),  # pyright: ignore
        prog=prog,
        usage=f"{prog} [--config RECIPE.yaml] [options] [options of accelerate launch]",
        description=_DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def read_command_line(parser: TrlParser, argv: Sequence[str]) -> Given:
    """Reads the recipe and the command line, without making the dataclasses, which would initialise the device.

    The recipe's values become defaults of `parser`, and its `env` goes into the environment.

    Raises:
        ValueError: The recipe does not exist or is no mapping.
    """
    recipe_parser = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--config")
    found, arguments = recipe_parser.parse_known_args(list(argv))
    recipe = {} if found.config is None else _read_recipe(found.config)
    for name, value in (recipe.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    parser.set_defaults_with_config(**recipe)
    namespace, launcher = parser.parse_known_args(arguments)
    values = vars(namespace)
    recipe_launcher = [
        word
        for name, value in recipe.items()
        if name not in values and value not in (None, False)
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    return Given(values, _without(arguments, launcher), launcher, recipe_launcher)


def changed_options(given: Given) -> dict[str, Any]:
    """The options whose value is not their default, without tokens of the Hub."""
    defaults = vars(make_parser().parse_args([]))
    return {
        name: value for name, value in given.values.items() if value != defaults[name] and not name.endswith("_token")
    }


def _read_recipe(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"`--config {path}`: there is no such file.")
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    if not isinstance(recipe, dict):
        raise ValueError(f"`--config {path}`: a recipe is a YAML mapping of options to values, got {recipe!r:.60}.")
    env = recipe.get("env")
    if env is not None and not isinstance(env, dict):
        raise ValueError(f"`--config {path}`: `env` must be a mapping of variables to values, got {env!r:.60}.")
    return recipe


def _without(words: Sequence[str], removed: Sequence[str]) -> list[str]:
    """`words` less `removed`, which occur among them in this order."""
    pending = list(removed)
    kept = []
    for word in words:
        if pending and word == pending[0]:
            pending.pop(0)
        else:
            kept.append(word)
    return kept
