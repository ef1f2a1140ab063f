"""A whole preference step: TRL's `DPOTrainer` beside `OTPOTrainer`, each by its own `train()` on the same pairs.

    python -m benchmarks.preference_step                             all comparisons that the time allows
    python -m benchmarks.preference_step --shapes qwen3-1.7b --lengths ragged --adapters full --checkpointing yes
    python -m benchmarks.preference_step --engine ddp --gpus 2       or zero3, by `accelerate launch`
    python -m benchmarks.preference_step --profile otpo-auto --lengths ragged
    python -m benchmarks.preference_step --tiny --output /tmp/tiny.csv          on the CPU: a test of this program
    python -m benchmarks.preference_step --figure benchmarks/results/preference_step_h100.csv

Random weights of a seed in bfloat16, fused AdamW, beta 0.1, 8 pairs a step on each GPU, new lengths in every step of
`ragged`. One contender runs after the other, its memory freed; the rows of a comparison are of one run, and replace
those that the CSV had of it.

A time is taken only if, in the same run, one batch's loss and gradients are right: ours with `uniform` weights, which
is DPO. What is right is TRL's step in float32; on a GPU a contender may be as far off as TRL's own step in bfloat16,
within the factor of `agreement.gate_of`. Then ours is timed with its default weights. `status` says what differs
otherwise.

`ms` is the median between the ends of steps on the device's clock, `host_ms` on the host's; the device is waited for
around all timed steps (`window_ms`: their mean) and in none. `tokens_per_s` counts real tokens of both rows of a pair
over the window. `mfu` is 8 N FLOPs a real token over the GPU's bfloat16 rate, N the parameters that a token meets:
those of the experts chosen for it, the head, no input embeddings; 6 N with adapters. `idle_share` is 1 - (time with a
kernel) / (wall time) of profiled steps, `peak_mib` the allocator's most in training. `first_step_s` is the very first
step, that which is compared, with all that it compiles; `again_s` the first step of the timed training.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers
from rich.console import Console

import otpo
from benchmarks import harness
from benchmarks.preference_step import report
from benchmarks.preference_step.agreement import Step, WrongResult, differences, gate_of, require_agreement
from benchmarks.preference_step.cases import CONTENDERS, LENGTHS, SHAPES, TRL, Case
from benchmarks.preference_step.training import Span, clear, first_step, profile_text, timed_steps

ENGINES = ("single", "ddp", "zero3")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 if a contender has no time."""
    args = parse(arguments)
    console = Console(width=200, highlight=False, quiet=int(os.environ.get("RANK", "0")) > 0)
    if args.figure:
        rows = harness.read_rows(args.figure)
        report.verdict(rows, console)
        console.print(f"{report.markdown(rows)}\n\npadded rows over TRL's step: {report.overhead(rows)}")
        console.print(f"{report.draw(args.figure)}")
        return 0
    if args.engine != "single" and "LOCAL_RANK" not in os.environ:
        return launch(args, arguments)
    rows = run(args, console)
    if console.quiet:
        return 0
    report.verdict(rows, console)
    with contextlib.suppress(ModuleNotFoundError):  # matplotlib is not everywhere; --figure draws it elsewhere
        console.print(f"{report.draw(args.output)}")
    console.print(f"{args.output}")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(name: str, choices: list[str], **options: Any) -> None:
        parser.add_argument(name, nargs="+", default=choices, choices=choices, metavar="NAME", **options)

    several("--shapes", list(SHAPES), help=", ".join(SHAPES))
    several("--lengths", list(LENGTHS), help=", ".join(LENGTHS))
    several("--contenders", list(CONTENDERS), help=", ".join(CONTENDERS))
    several("--adapters", ["full", "lora"], help="full, lora")
    several("--checkpointing", ["yes", "no"], help="yes, no")
    parser.add_argument("--engine", default="single", choices=ENGINES)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="of ddp and zero3")
    parser.add_argument("--pairs", type=int, default=8, metavar="B", help="of a step of one GPU")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them, at least 1")
    parser.add_argument("--profiled", type=int, default=3, help="steps after them, at least 1, under the profiler")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further contender after this time")
    parser.add_argument("--profile", choices=list(CONTENDERS), metavar="NAME", help="write its largest kernels too")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/preference_step_GPU.csv")
    parser.add_argument("--tiny", action="store_true", help="small models and pairs, on the CPU too")
    parser.add_argument("--figure", type=Path, metavar="CSV", help="only print the verdict on this CSV and draw it")
    args = parser.parse_args(arguments)
    if min(args.steps, args.warmup, args.profiled, args.pairs) < 1:
        parser.error("--steps, --warmup, --profiled and --pairs must be at least 1")
    if args.profile and args.profile not in args.contenders:
        parser.error(f"--profile {args.profile} is none of --contenders")
    if not args.figure and not torch.cuda.is_available() and not args.tiny:
        parser.error("this benchmark needs a GPU; on the CPU, --tiny tests it")
    args.output = args.output or Path("benchmarks/results") / f"preference_step_{harness.name_of_machine()}.csv"
    return args


def launch(args: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    """Starts the processes of an engine, which run the same command."""
    config = Path(otpo.__file__).parent / "cli" / "accelerate_configs" / f"{args.engine}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(args.gpus), "-m", "benchmarks.preference_step"]
    return subprocess.run([*command, *(sys.argv[1:] if arguments is None else arguments)], check=False).returncode


def quiet() -> None:
    """Neither bars nor notes of what is meant to be so, between the lines of the benchmark."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")


def run(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every contender of every case; the CSV is written after each, so that a killed run keeps its rows.

    Returns:
        The rows of this run.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    machine = harness.describe_machine("transformers", "trl", "peft", "accelerate")
    deadline = harness.Deadline(args.minutes)
    kept = [dict(row) for row in harness.read_rows(args.output)] if args.output.exists() else []
    rows: list[dict[str, Any]] = []
    # Comparisons of the same pairs stand side by side; TRL comes first, since the others are compared with it.
    for shape, adapter, checkpointing, lengths in itertools.product(
        args.shapes, args.adapters, args.checkpointing, args.lengths
    ):
        case = Case(shape, lengths, adapter, checkpointing == "yes", args.engine, world, args.pairs, args.tiny)
        console.print(f"{shape}: {report.title_of(case.columns)}")
        comparison = Comparison(case, args, device or torch.device("cpu"))
        for name in (name for name in CONTENDERS if name in args.contenders):
            if deadline.passed:
                console.print(f"not reached in time: {name}")
                continue
            row = comparison.row_of(name) | machine
            rows.append(row)
            console.print(report.line(row))
            if not console.quiet:
                mine = {report.case_of(row) for row in rows}
                others = [row for row in kept if report.case_of(row) not in mine]
                harness.write_rows(args.output, [*others, *rows], (*report.COLUMNS, *machine))
    return rows


class Comparison:
    """The contenders of one case, and TRL's first step that all are compared with."""

    def __init__(self, case: Case, args: argparse.Namespace, device: torch.device) -> None:
        self.case, self.args, self.device = case, args, device
        self.is_first = int(os.environ.get("RANK", "0")) == 0
        self.expected: Step | None = None
        self.trls: dict[str, Any] | None = None
        self.no_comparison = ""  # why TRL's step is not there
        self.trl_rate: float | None = None

    def row_of(self, name: str) -> dict[str, Any]:
        """One line of the CSV. On several processes an error ends the run: the others would wait for this one."""
        row: dict[str, Any] = dict.fromkeys(report.COLUMNS, "")
        row |= {**self.case.columns, "contender": name, "steps": self.args.steps, "status": "ok"}
        if self.no_comparison:
            return row | {"status": self.no_comparison}
        try:
            self._fill(row, name)
        except WrongResult as error:
            row["status"] = f"wrong: {error}"
        except Exception as error:
            if self.case.gpus > 1:
                raise
            row["status"] = harness.reason(error)
            if self.expected is None:
                self.no_comparison = f"nothing to compare with, trl: {row['status']}"
        clear(self.device)
        return row

    def _fill(self, row: dict[str, Any], name: str) -> None:
        # What is right is TRL's step in float32. On a GPU TRL's own in bfloat16 says how far off rounding is.
        trl, keeps = CONTENDERS[TRL], self.is_first
        if self.expected is None:
            self.expected = first_step(self.case, trl, self.device, keeps=keeps, exact=True)
            clear(self.device)
        found: Step | None = None
        if self.trls is None:
            found = self.expected
            if self.device.type == "cuda":
                found = first_step(self.case, trl, self.device, keeps=keeps)
                clear(self.device)
            self.trls = differences(found, self.expected, self.device) if keeps else {}
        if name != TRL or found is None:
            found = first_step(self.case, CONTENDERS[name], self.device, keeps=keeps)
            clear(self.device)
        row["first_step_s"] = round(found.seconds, 2)
        self._compare(row, found, self.expected)
        # What agrees is timed.
        span = Span(self.args.warmup, self.args.steps, self.args.profiled)
        timed, profile = timed_steps(self.case, CONTENDERS[name], self.device, span)
        row |= timed
        if name == TRL:
            self.trl_rate = timed["tokens_per_s"]
        if self.trl_rate:
            row["speedup"] = round(timed["tokens_per_s"] / self.trl_rate, 3)
        if name == self.args.profile and self.is_first:
            case, output = self.case, self.args.output
            words = [output.stem, case.shape, case.lengths, case.adapter, case.engine, name]
            words += ["checkpointing"] * case.checkpointing
            output.with_name(f"{'_'.join(words)}.txt").write_text(profile_text(profile, self.device))

    def _compare(self, row: dict[str, Any], found: Step, expected: Step) -> None:
        """Writes the differences from TRL's step; raises a `WrongResult`, on all processes, where they are large."""
        differing: dict[str, Any] = {}
        problem: list[str | None] = [None]
        if self.is_first:
            try:
                differing = differences(found, expected, self.device)
                require_agreement(differing, gate_of(self.trls if self.device.type == "cuda" else None))
            except WrongResult as error:
                problem = [str(error)]
        for column, value in differing.items():
            row[column] = value if isinstance(value, str) else float(f"{value:.6g}")
        if self.case.gpus > 1:
            torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise WrongResult(problem[0])


if __name__ == "__main__":
    quiet()
    sys.exit(main())
