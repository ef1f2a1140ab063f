"""The console script `otpo`: a table of commands, each imported when it is run."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from otpo import __version__

from .launching.interrupt import importing, interruptible
from .options.short_help import read


class Command(NamedTuple):
    """A command: its line in the help, and the module whose `main(argv) -> int` runs it."""

    help: str
    module: str


COMMANDS = {
    "align": Command("Align a model on preference pairs, on one device or many.", "otpo.cli.align"),
    "pretrain": Command("Pretrain a Compass Mixture-of-Experts model, stage by stage.", "otpo.cli.pretrain"),
    "sft": Command("Fine-tune a model on instructions and their answers.", "otpo.cli.sft"),
    "pairs": Command("Make preference pairs of a model's own answers, which a judge scores.", "otpo.cli.pairs"),
    "explain": Command("Show which tokens of a pair count, as an HTML page or a PNG.", "otpo.cli.explain"),
    "chat": Command("Chat with a model in the terminal, or with two side by side.", "otpo.cli.chat"),
    "eval": Command("Score a model, or two side by side, by tasks of lm-eval, with intervals.", "otpo.cli.eval"),
    "export": Command("Write a Compass model as Qwen3-MoE, or as llama.cpp's file, to be served.", "otpo.cli.export"),
    "quantize": Command(
        "Write a Mixture-of-Experts model in FP8 for vLLM, calibrated for rare experts too.", "otpo.cli.quantize"
    ),
    "import": Command("Write a Qwen3-MoE or Mixtral model as a Compass one.", "otpo.cli.import_model"),
    "env": Command("Print versions, devices and folders, to be pasted into an issue.", "otpo.cli.env"),
    "plan": Command("Plan a training run: parameters, memory of a GPU, communication, time.", "otpo.cli.plan"),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the first word; the command's own parser reads the rest."""
    parser = argparse.ArgumentParser(
        prog="otpo",
        usage="otpo [--version] COMMAND [options]",
        description="Align language models on preference pairs with token weights from optimal transport.",
        epilog="`otpo COMMAND --help` lists the options of a command, `--help-all` those of TRL and transformers too.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"otpo {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; 2 for a command or an option that does not exist."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    asked = argv[1:]
    if asked in (["--help"], ["-h"]):
        text = read(command)
        if text is not None:
            sys.stdout.write(text)
            return 0
    if "--help-all" in asked:
        asked = ["--help"]
    with importing():
        module = import_module(COMMANDS[command].module)
    return interruptible(f"otpo {command}", lambda: module.main(asked))


if __name__ == "__main__":
    sys.exit(main())
