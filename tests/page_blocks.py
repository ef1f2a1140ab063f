"""Code blocks of Markdown pages, run or read as the library reads them.

A block is what its language says: `python` runs, `bash` is parsed by the parsers of the commands in it, `yaml` is read
as a recipe or as accelerate's configuration, `json` holds rows of data, `text` is what a command prints. A block whose
first line is a comment with a file's name, `# my_judge.py`, is that file of the reader's. Above a block, a line
`<!-- read only: needs a GPU -->` keeps Python from being run, and `<!-- run -->` has its `otpo` commands run.
"""

import re
import shlex
import tomllib
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "path/to/a/chat/model"
BLOCK = re.compile(r"(?:<!-- (read only: .+|run) -->\n)?^```([\w-]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml|sh|jsonl))(?:,.*)?\n")
TRAINING = ("align", "sft", "pretrain")


class Block(NamedTuple):
    """A code block: the page and line that it starts on, what is said above it, its language and its text."""

    page: str
    line: int
    note: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the reader's file that the block is."""
        found = FILE.match(self.text.removeprefix("#!/bin/bash\n"))
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text.count("\n", 0, found.start()) + 1, found[1] or "", found[2], found[3])
        for found in BLOCK.finditer(text)
    ]


def files(found: Iterable[Block]) -> dict[str, str]:
    """The files of the reader's among a page's blocks, by name."""
    return {block.file: block.text for block in found if block.file is not None}


def commands(text: str) -> list[str]:
    """The command lines of a shell's block: no comments, lines that go on in the next one joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def check_command(command: str) -> None:
    """Fails unless the program of a command line would take it.

    Raises:
        AssertionError: The program is not known here, or names something that is not there.
        ValueError: `otpo` refuses an option.
        SystemExit: Its parser does.
    """
    words = shlex.split(re.sub(r'"?\$\w+"?', "1", command), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables before the program
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "otpo":
        check_otpo(rest)
    elif program in ("pip", "uv"):
        check_install(words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), command
    elif program == "accelerate":
        check_accelerate(rest)
    elif program == "srun":
        check_command(shlex.join(rest))
    elif program == "bash":
        assert rest[0] == "-c" and len(rest) == 2, command
        check_command(rest[1])
    elif program == "python":
        check_python(rest)
    else:
        assert program in ("cd", "export", "git", "sbatch", "source"), f"who reads `{command}`?"


def check_otpo(words: list[str]) -> None:
    """Parses a command of `otpo` by the command's own parser, as far as it goes without models and data."""
    from otpo.cli.launching.launch import check_options
    from otpo.cli.main import COMMANDS, main
    from otpo.cli.options.preflight import check_options_alone
    from otpo.cli.options.run_options import GroupedParser, read_command_line

    if not words or words[0].startswith("-"):
        if "--version" not in words:
            assert main(words) == 0
        return
    name, rest = words[0], words[1:]
    assert name in COMMANDS, name
    if name == "env":
        assert not set(rest) - {"--json"}
        return
    module: Any = import_module(COMMANDS[name].module)
    if set(rest) & {"--help", "--help-all"}:
        assert len(rest) == 1
        return
    if name == "plan":  # which needs nothing, and so runs
        with redirect_stdout(StringIO()):
            assert module.main(rest) == 0
        return
    parser = module.make_parser()
    if name not in TRAINING and not isinstance(parser, GroupedParser):
        parser.parse_args(rest)
        return
    given = read_command_line(parser, rest)
    if name not in TRAINING:
        assert not given.launcher and not given.recipe_launcher, given.launcher
        return
    check_options_alone(given.values)
    check_options([*given.recipe_launcher, *given.launcher], name)


def check_accelerate(words: list[str]) -> None:
    """Parses `accelerate launch` by accelerate's parser, and the command of ours behind it by ours."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", words
    args = launch_command_parser().parse_args(words[1:])
    assert args.module and args.training_script.startswith("otpo.cli."), args.training_script
    check_otpo([args.training_script.removeprefix("otpo.cli."), *args.training_script_args])


def check_python(words: list[str]) -> None:
    """Checks that a module or a script of the repository is there."""
    if words[0] == "-m":
        assert words[1] in ("venv", "pip") or find_spec(words[1]) is not None, words
    else:
        assert (ROOT / words[0]).is_file(), words


def check_install(words: list[str]) -> None:
    """Checks that what is installed of otpo has the extras that are named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        if word.startswith(("otpo", ".")) and "/" not in word:
            extras = Requirement(word.replace(".", "otpo", 1) if word.startswith(".") else word).extras
            assert extras <= set(project["optional-dependencies"]), word


def check_yaml(text: str, path: Path) -> None:
    """Reads a block as accelerate does where it is a configuration of accelerate's, else as a recipe of a command.

    A recipe's first comment names its command, as in `# my_recipe.yaml, for otpo align`; `# ..., a mixture` makes it
    one of `otpo pretrain --mixture`.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    from moe_backbone.pretraining.mixture import read_mixture

    path.write_text(text, encoding="utf-8")
    if "distributed_type" in text:
        load_config_from_file(str(path))
    elif "stages:" in text:
        read_mixture(str(path))
    else:
        command = re.search(r"^# .*for otpo (\w+)", text, re.MULTILINE)
        assert command, f"a comment must say which command reads this:\n{text}"
        check_otpo([command[1], "--config", str(path)])
