"""What the training commands' options share: the parser, recipes, and what of a command line is the launcher's."""

import argparse
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from .recipe import conform, option_types, read_recipe, require_choices, require_json
from .redact import without_secrets

LAUNCHING = """\
--config RECIPE.yaml reads options from a file; those of the command line win. --accelerate_config takes a file, or
single_gpu, ddp, zero2, zero3 or fsdp2, or a name of TRL's. It and any other option of `accelerate launch` make the
command launch itself that way; without one, it starts a process on each visible GPU, or runs in this process where
there is one or none, on the CPU, and for quantized models and those with a `device_map`. `--num_processes 1` keeps to
one GPU. OTPO_TRACEBACK=1 in the environment shows where an error comes from.
"""
EXPERT_PARALLEL_BACKENDS = ("deepspeed", "transformers")
EXPERT_EXCHANGES = ("auto", "gather", "all_to_all")
_UNSET = object()
_METAVARS = {int: "N", float: "X", str: "TEXT"}

Groups = Sequence[tuple[str, Sequence[type]]]
"""Titles of a help's groups and the dataclasses whose options they hold; the first that has a name takes it."""


@dataclass
class RunArguments:
    """What a command does around the training.

    Parameters:
        report: Path of a JSON file with the last metrics, versions, device and options of the run.
        expert_parallel_size: Processes of a machine that share the experts of a Mixture-of-Experts model.
        expert_parallel_backend: One of [`EXPERT_PARALLEL_BACKENDS`].
        expert_exchange: How DeepSpeed's spread experts get their rows, one of [`EXPERT_EXCHANGES`].
        save_code: Whether checkpoints of a Compass model carry the model's code.
        experts_implementation: Which of transformers' experts functions runs the experts of a Mixture-of-Experts
            model; see `otpo.cli.models.experts`.
        verbose: Whether the console shows all of a log, of bars and of failures; see `otpo.cli.running.console`.
        notes: Lines for the header, found while the models were made.
        resolved: Options that were not set, by name, as they were chosen while the models were made.
    """

    report: str | None = field(
        default=None,
        metadata={
            "help": "Path of a JSON file to write: last metrics, versions, device, duration, and the options that "
            "differ from the defaults."
        },
    )
    expert_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes of a machine that share the experts of a Mixture-of-Experts model, each holding its "
            "part of them. 1 holds all experts in every process."
        },
    )
    expert_parallel_backend: str = field(
        default="deepspeed",
        metadata={
            "help": "What spreads the experts: deepspeed (ZeRO-1, 2 or 3 beside it) or transformers (FSDP2 beside it, "
            "transformers 5.23 or later)."
        },
    )
    expert_exchange: str = field(
        default="auto",
        metadata={
            "help": "How rows reach experts that DeepSpeed spreads, in training. `all_to_all` sends each row to its "
            "expert, and waits for the device in each layer; `gather` gives every process all tokens, without that "
            "wait, and needs more memory for the experts' rows. `sft` and `align`, whose batches vary, wait for the "
            "other processes' hosts once in each pass then, and gather in evaluation and in the reference too. `auto` "
            "gathers in `pretrain` where no more processes share the experts than a token has, else `all_to_all`.",
            "choices": list(EXPERT_EXCHANGES),
        },
    )
    save_code: bool = field(
        default=False,
        metadata={
            "help": "Whether to save the code of a Compass model with it, so that it loads by `trust_remote_code` "
            "where otpo is not installed."
        },
    )
    experts_implementation: str = field(
        default="auto",
        metadata={
            "help": "What computes the experts of a Mixture-of-Experts model, and of its reference: auto, memcpy, "
            "grouped_mm, batched_mm, eager, or another that transformers has. auto is memcpy on a GPU (rows moved by "
            "Triton kernels), grouped_mm on the CPU and where memcpy can't run, eager where neither can."
        },
    )
    verbose: bool = field(
        default=False,
        metadata={
            "help": "Show every number of a log, what the libraries below deprecate, their bars, and where each of "
            "several processes failed. Unset: a line of a few numbers; trackers and trainer_state.json have all of "
            "them."
        },
    )
    notes: dict[str, str] = field(default_factory=dict, init=False)
    resolved: dict[str, Any] = field(default_factory=dict, init=False)


@dataclass
class Given:
    """A command line that has been read but not checked.

    Attributes:
        values: Value of each option of ours, defaults included.
        defaults: Their values without recipe and command line.
        arguments: The command line less its `--config`, for the parser whose defaults are the recipe's.
        launcher: Options that are not ours, from the command line.
        recipe_launcher: The same from the recipe.
        said: Where each of our options was set, `"command line"` or `"recipe"`, be it to its default or not.
    """

    values: dict[str, Any]
    defaults: dict[str, Any]
    arguments: list[str]
    launcher: list[str]
    recipe_launcher: list[str]
    said: dict[str, str] = field(default_factory=dict)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class GroupedParser(TrlParser):
    """`TrlParser` whose help has the options in groups, with short placeholders."""

    def __init__(self, dataclass_types: Sequence[type], groups: Groups, **kwargs: Any) -> None:
        self.titles = [title for title, _ in groups]
        self._title_of: dict[str, str] = {}
        for title, owners in groups:
            for owner in owners:
                for name in inspect.get_annotations(owner):
                    self._title_of.setdefault(name, title)
        self._groups: dict[str, Any] = {}
        super().__init__(dataclass_types, **kwargs)  # pyright: ignore[reportArgumentType]

    def title_of(self, name: str) -> str | None:
        """The group of the help that an option stands in; None for one outside of them."""
        return self._title_of.get(name)

    def add_argument(self, *name_or_flags: str, **kwargs: Any) -> argparse.Action:
        """Adds an option to the group of its dataclass."""
        title = self.title_of(kwargs.get("dest", name_or_flags[0].lstrip("-")))
        if title is None:
            return super().add_argument(*name_or_flags, **kwargs)
        if "action" not in kwargs and "choices" not in kwargs:
            placeholder = "BOOL" if kwargs.get("nargs") == "?" else _METAVARS.get(kwargs["type"], "VALUE")
            kwargs.setdefault("metavar", placeholder)
        if not self._groups:
            self._groups = {name: self.add_argument_group(name) for name in self.titles}
        return self._groups[title].add_argument(*name_or_flags, **kwargs)


def make_grouped_parser(prog: str, description: str, types: Sequence[type], groups: Groups) -> GroupedParser:
    """A command's parser of the dataclasses `types`, which also says how the command is launched.

    Args:
        prog: How the command is called, such as `"otpo align"`.
        description: What it does, with examples.
        types: Dataclasses in the order in which their instances are handed out.
        groups: Groups of the help.
    """
    usage = f"{prog} [--config RECIPE.yaml] [options] [options of accelerate launch]"
    return _make_parser(prog, usage, f"{description}\n{LAUNCHING}", types, groups)


def make_plain_parser(prog: str, description: str, types: Sequence[type], groups: Groups) -> GroupedParser:
    """[`make_grouped_parser`] for a command that runs in one process and has no launcher."""
    return _make_parser(prog, f"{prog} [--config RECIPE.yaml] [options]", description, types, groups)


def _make_parser(prog: str, usage: str, description: str, types: Sequence[type], groups: Groups) -> GroupedParser:
    return GroupedParser(
        types,
        groups,
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def read_command_line(parser: TrlParser, argv: Sequence[str], settings: Mapping[str, Any] | None = None) -> Given:
    """Reads the recipe and the command line, without making the dataclasses, which would initialise the device.

    The recipe's values become defaults of `parser`, and its `env` goes into the environment.

    Args:
        parser: Of the command.
        argv: The command line.
        settings: Options that hold where neither the recipe nor the command line sets them.

    Raises:
        ValueError: The recipe can't be read, or a value is not of its option's type.
    """
    # The recipe is read before everything else: it says what the other options default to.
    types = option_types(parser.dataclass_types)
    defaults = vars(parser.parse_args([]))
    recipe_parser = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--config")
    found, arguments = recipe_parser.parse_known_args(list(argv))
    recipe: dict[str, Any] = {}
    if found.config is not None:
        recipe = read_recipe(found.config)
        environment = recipe.pop("env", None) or {}
        recipe = conform(recipe, types, found.config)
        choices: dict[str, Any] = {action.dest: action.choices for action in parser._actions if action.choices}
        require_choices(recipe, choices, found.config)
        for name, value in environment.items():
            os.environ[name] = str(value)

    # Later defaults win: settings, then the recipe; the command line wins over both.
    parser.set_defaults_with_config(**(settings or {}))
    parser.set_defaults_with_config(**recipe)
    namespace, launcher = parser.parse_known_args(arguments)
    values = vars(namespace)
    require_json(values, types)

    # Recipe entries that are no option of ours go to the launcher.
    recipe_launcher = [
        word
        for name, value in recipe.items()
        if name not in values and value not in (None, False)
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]

    # An option that the command line doesn't set keeps what a namespace had before.
    unset = argparse.Namespace(**dict.fromkeys(values, _UNSET))
    typed = [name for name, value in vars(parser.parse_known_args(arguments, unset)[0]).items() if value is not _UNSET]
    said = dict.fromkeys((name for name in recipe if name in values), "recipe") | dict.fromkeys(typed, "command line")
    return Given(values, defaults, _without(arguments, launcher), launcher, recipe_launcher, said)


def changed_options(given: Given) -> dict[str, Any]:
    """The options whose value is not their default, with secrets left out."""
    changed = {name: value for name, value in given.values.items() if value != given.defaults[name]}
    return without_secrets(changed)


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
