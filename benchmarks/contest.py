"""The command line of a benchmark whose rows are contenders at shapes, and which one small shape tries on the CPU."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import harness


class Contest(NamedTuple):
    """What a benchmark compares.

    Attributes:
        name: Of its file in `benchmarks/results`, before the GPU's.
        about: Its help.
        shapes: Sizes of a problem, by name.
        tiny: The same for a try on the CPU.
        contenders: Their names.
        ours: The one that must have a time.
        make: A problem of these sizes on a device.
        measure: A row of the CSV, with `status`, of a shape's name, a contender's and a problem.
        tell: The row's times for the terminal.
        packages: Whose versions a row has, beside torch's and Triton's.
    """

    name: str
    about: str | None
    shapes: Mapping[str, tuple[int, ...]]
    tiny: Mapping[str, tuple[int, ...]]
    contenders: Iterable[str]
    ours: str
    make: Callable[..., Any]
    measure: Callable[[str, str, Any], dict[str, Any]]
    tell: Callable[[dict[str, Any]], str]
    packages: tuple[str, ...]

    def run(self, arguments: Sequence[str] | None = None) -> int:
        """Measures what the arguments ask for, and writes the CSV after each row; 1 where ours has no time."""
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        names = list(self.contenders)
        parser.add_argument(
            "--shapes", nargs="+", default=list(self.shapes), choices=list(self.shapes), metavar="NAME"
        )
        parser.add_argument("--contenders", nargs="+", default=names, choices=names, metavar="NAME")
        parser.add_argument("--tiny", action="store_true", help="one small shape, on the CPU if there is no GPU")
        parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/{self.name}_GPU.csv")
        args = parser.parse_args(arguments)
        on_gpu = torch.cuda.is_available()
        if not on_gpu and not args.tiny:
            parser.error("this benchmark needs a GPU; `--tiny` tries the program on the CPU")
        path = args.output or Path("benchmarks/results") / f"{self.name}_{harness.name_of_machine()}.csv"
        machine = harness.describe_machine(*self.packages)
        console, rows = Console(width=160, highlight=False), []
        for shape, size in self.tiny.items() if args.tiny else [(name, self.shapes[name]) for name in args.shapes]:
            problem = self.make(*size, torch.device("cuda" if on_gpu else "cpu"))
            for name in args.contenders:
                rows.append(self.measure(shape, name, problem) | machine)
                harness.write_rows(path, rows)
                told = self.tell(rows[-1]) if rows[-1]["status"] == "ok" else rows[-1]["status"]
                console.print(f"{shape:<16}{name:<24}{told}")
                torch._dynamo.reset()  # graphs of other shapes count against a limit
        console.print(f"{path}")
        return 0 if all(row["status"] == "ok" for row in rows if row["contender"] == self.ours) else 1
