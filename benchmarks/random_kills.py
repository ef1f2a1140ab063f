"""Trainings that SIGKILL ends at random moments and that resume, beside the run that nothing interrupted.

    python -m benchmarks.random_kills                                 20 kills over all engines, full and LoRA
    python -m benchmarks.random_kills --engines ddp experts-zero3/lora --kills 4
    python -m benchmarks.random_kills --parallel 8 --seed 1

For each engine, `otpo align` of a tiny Compass first runs uninterrupted, with a checkpoint every two steps; on GPUs
twice, since two runs differ there by rounding. A kill is the same command in a folder of its own, all of whose
processes, the launcher's too, are halted and get SIGKILL at a moment that the seed draws: a quarter of them between
the start of the process and that of training, which takes most of the time, half of them until the last checkpoint is
written, saving included, and a quarter from there to the end of the command, which saves the model. Shares are of what
the uninterrupted run took for each. Then the
command is given again with `--resume_from_checkpoint true`, or as it was where no whole checkpoint is there yet.

`losses` is the largest difference of any step's logged loss to the uninterrupted run's, `weights` that of any number
of the files that are saved at the end. A kill is `ok` where they are at most `--factor` times what the uninterrupted
runs differ by (`noise_losses`, `noise_weights`), so exactly equal where those do not differ. `phase` says what the
kill left behind. The CSV is written after each kill; a killed benchmark goes on with those that it lacks.
"""

import argparse
import math
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.launching.commands import ADAPTERS, ENGINES, Case, Row, Setting
from benchmarks.launching.killing import PARTS, Draw, KilledRun, Moments, Result, differences, run_uninterrupted
from benchmarks.launching.materials import make_materials
from benchmarks.launching.processes import Ports, count_gpus, side_by_side

COLUMNS = (
    "kill",
    "engine",
    "adapter",
    "part",
    "share",
    "status",
    "reason",
    "phase",
    "moment_s",
    "killed",
    "resumed_from",
    "losses",
)
COLUMNS += ("weights", "noise_losses", "noise_weights", "seconds", "steps", "save_steps", "schedule", "seed", "gpus")
SCHEDULE = "linear"
KINDS = ("experts-zero1", "experts-zero2", "experts-zero3", "experts-transformers", "fsdp2", "ddp")
VERSIONS = ("transformers", "trl", "accelerate", "deepspeed", "peft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 if a run did not resume to the uninterrupted trajectory, or was not run."""
    args = parse(arguments)
    console = Console(width=200, highlight=False, markup=False)
    gpus = count_gpus()
    chosen = chosen_rows(args.engines, gpus)
    if not chosen:
        console.print(f"`--engines {' '.join(args.engines)}`: none of them runs here. There are {', '.join(KINDS)}.")
        return 2
    about = {"steps": args.steps, "save_steps": args.save_steps, "schedule": SCHEDULE, "seed": args.seed, "gpus": gpus}
    about |= harness.describe_machine(*VERSIONS)
    draws = draw_kills(chosen, args.kills, args.seed)
    rows = kept_rows(args.output, about, draws, args.factor)
    missing = [draw for draw in draws if rows.get(draw.number, {}).get("status") != "ok"]
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, ports = Path(name), Ports()
        setting = Setting(make_materials(folder / "materials"), gpus > 0, False, args.steps, args.save_steps, SCHEDULE)
        needed = list(dict.fromkeys(draw.row for draw in missing))
        runs = args.uninterrupted or (2 if gpus else 1)

        # They compile what an engine compiles, so that no kill hits a compiler and leaves its lock behind.
        def uninterrupted(row: Row) -> Moments | str:
            moments = run_uninterrupted(row, setting, folder / "whole", ports, runs, args.patience)
            told = moments if isinstance(moments, str) else moments.describe()
            console.print(f"uninterrupted  {row.engine}/{row.case.adapter}: {told}", soft_wrap=True)
            return moments

        whole = dict(side_by_side(uninterrupted, needed, args.parallel))

        def killed(draw: Draw) -> dict[str, Any]:
            moments = whole[draw.row]
            if isinstance(moments, str):
                return {"status": "failed", "reason": f"the uninterrupted run: {moments}"}
            found = KilledRun(draw, setting, folder / f"kill{draw.number}", ports, moments, args.patience).run()
            if "result" in found:
                found |= judge(found.pop("result"), moments, args.factor)
            return found

        for draw, found in side_by_side(killed, missing, args.parallel):
            rows[draw.number] = dict.fromkeys(COLUMNS, "") | describe_draw(draw) | found | about
            harness.write_rows(args.output, [rows[number] for number in sorted(rows)])
            console.print(line(rows[draw.number]), soft_wrap=True)
    done = [rows[draw.number] for draw in draws]
    right = sum(row["status"] == "ok" for row in done)
    console.print(f"{right} of {len(done)} resumed to the uninterrupted trajectory; {args.output}")
    return 0 if right == len(done) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", nargs="+", default=list(KINDS), metavar="NAME", help=f"NAME or NAME/ADAPTER: {', '.join(KINDS)}")
    add("--kills", type=int, default=20, help="in all, the engines in turn")
    add("--seed", type=int, default=0, help="of the moments")
    add("--steps", type=int, default=8, help="of each training")
    add("--save_steps", type=int, default=2, help="steps from one checkpoint to the next")
    add("--uninterrupted", type=int, metavar="N", help="uninterrupted runs of each engine; default: 2 on GPUs, else 1")
    add("--factor", type=float, default=10, help="times that what uninterrupted runs differ by which is still ok")
    add("--parallel", type=int, metavar="N", help="runs at a time; default: one for three CPU cores")
    add("--patience", type=float, default=300, metavar="SECONDS", help="a run that takes longer is ended")
    add("--folder", type=Path, help="where runs are written; default: the system's temporary folder")
    add("--output", type=Path, help="default: benchmarks/results/random_kills_MACHINE_xGPUS.csv")
    args = parser.parse_args(arguments)
    if min(args.kills, args.steps, args.save_steps) < 1 or args.save_steps > args.steps:
        parser.error("--kills, --steps and --save_steps must be at least 1, and --save_steps at most --steps")
    args.parallel = args.parallel or max(1, (os.cpu_count() or 1) // 3)
    gpus = count_gpus()
    machine = f"{harness.name_of_machine()}{f'_x{gpus}' if gpus > 1 else ''}"
    args.output = args.output or Path("benchmarks/results") / f"random_kills_{machine}.csv"
    return args


def chosen_rows(names: Sequence[str], gpus: int) -> list[Row]:
    """The engines that were named and run here, each with every adapter that was not left out."""
    rows = [Row(Case("align", "compass", adapter), name) for name in KINDS for adapter in ADAPTERS]
    wanted = [row for row in rows if {row.engine, f"{row.engine}/{row.case.adapter}"} & set(names)]
    return [row for row in wanted if gpus > 1 or (gpus == 0 and ENGINES[row.engine].on_cpu is not None)]


def draw_kills(rows: Sequence[Row], kills: int, seed: int) -> list[Draw]:
    """The kills, the engines in turn; the same for the same seed and engines."""
    source = random.Random(seed)
    found = []
    for number in range(kills):
        part = source.choices(PARTS, (1, 2, 1))[0]
        found.append(Draw(number, rows[number % len(rows)], part, source.random()))
    return found


def judge(result: Result, moments: Moments, factor: float) -> dict[str, Any]:
    """Whether a resumed run is the uninterrupted one, but for what two of these differ by."""
    losses, weights = differences(moments.result, result)
    noise = {"noise_losses": moments.noise[0], "noise_weights": moments.noise[1]}
    told = {"losses": losses, "weights": weights, **noise}
    return told | judge_numbers(told, factor)


def judge_numbers(row: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Status and reason by the numbers of a row."""
    losses, weights = float(row["losses"]), float(row["weights"])
    within = losses <= factor * float(row["noise_losses"]), weights <= factor * float(row["noise_weights"])
    if all(within):  # not so where one is NaN
        return {"status": "ok", "reason": ""}
    missing = "a step or a weight is missing" if math.inf in (losses, weights) else "another trajectory"
    return {"status": "differs", "reason": missing}


def describe_draw(draw: Draw) -> dict[str, Any]:
    """What tells a kill from others: its number is of the engines that were named."""
    named = {"kill": draw.number, "engine": draw.row.engine, "adapter": draw.row.case.adapter}
    return named | {"part": draw.part, "share": round(draw.share, 6)}


def kept_rows(path: Path, about: dict[str, Any], draws: Sequence[Draw], factor: float) -> dict[int, dict[str, Any]]:
    """The rows of a CSV that are of the same kills on the same machine, judged by this run's factor."""
    if not path.is_file():
        return {}
    rows = {row["kill"]: dict(row) for row in harness.read_rows(path)}
    kept = {}
    for draw in draws:
        same = {name: str(value) for name, value in (about | describe_draw(draw)).items() if name != "date"}
        row = rows.get(str(draw.number), {})
        if all(row.get(name) == same[name] for name in same):
            kept[draw.number] = row | (judge_numbers(row, factor) if row["status"] in ("ok", "differs") else {})
    return kept


def line(row: dict[str, Any]) -> str:
    """A kill in a line."""
    name = f"{row['engine']}/{row['adapter']}"
    told = f"{row['status']:<8} {row['kill']:>3} {name:<28} "
    if row["phase"]:
        told += f"killed after {row['moment_s']:>5} s, {row['phase']}; resumed from step {row['resumed_from']}; "
    if row["losses"] != "":
        told += f"differs by {row['losses']:.3g} in losses, {row['weights']:.3g} in weights"
    return f"{told}{'; ' if row['losses'] != '' and row['reason'] else ''}{row['reason']}"


if __name__ == "__main__":
    raise SystemExit(main())
