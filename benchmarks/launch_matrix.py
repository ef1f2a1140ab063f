"""Each row of the launching table once, as its user types it, its losses beside those of one process.

    python -m benchmarks.launch_matrix                              all rows; goes on where a killed run ended
    python -m benchmarks.launch_matrix --rows align/ fsdp2          rows whose names have one of these parts
    python -m benchmarks.launch_matrix --parallel 10 --minutes 6    so many at a time; starts none after that time

A row is command/model/adapter/engine (`benchmarks/launching/commands.py`): `otpo pretrain`, `sft` or `align` of a tiny
model, by one process, DDP, FSDP2, ZeRO, DeepSpeed's and transformers' expert parallelism, with every weight or LoRA.
It takes a few large steps, writes a checkpoint with the last one and saves its model. One process takes as many
micro-batches a step as there are processes otherwise, so all have the same rows in the same micro-batches, and its
first losses are the others' too but for rounding: `difference` is the largest of any step.

Computation is in float32 unless `--bf16` is given, since rounding in bfloat16 would hide what is wrong. On one GPU, or
on CPU processes where there is none, rows that need more say so. The CSV is written after each row.

- `ok`, `differs`: the losses are within `bound`, or not.
- `refused`: the command refused the combination with exit code 2; `reason` is its sentence.
- `failed`: it ended otherwise, or took longer than `--patience`. `not run`: `reason` says why.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.launching.commands import ENGINES, SINGLE, Row, Setting, all_rows, as_typed, command_line
from benchmarks.launching.materials import make_materials
from benchmarks.launching.processes import Ports, Started, count_gpus, last_line, names_of_gpus, run_together, start

COLUMNS = ("command", "model", "adapter", "engine", "status", "reason", "difference", "bound", "losses", "single")
COLUMNS += ("seconds", "steps", "precision", "gpus", "typed")
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of the difference of losses: that of the tests of expert parallelism, and what bfloat16's rounding makes of it."""
DONE = ("ok", "differs", "refused")
VERSIONS = ("transformers", "trl", "accelerate", "deepspeed", "peft")
REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 if a row failed, differs, or was not reached in time."""
    args = parse(arguments)
    console = Console(width=200, highlight=False, markup=False)
    rows = [row for row in all_rows() if not args.rows or any(part in row.name for part in args.rows)]
    if not rows:
        console.print(f"`--rows {' '.join(args.rows)}`: no row's name has one of these parts. `--list` names all.")
        return 2
    if args.list:
        console.print("\n".join(row.name for row in rows))
        return 0
    # Every row needs its single process, which the user need not name.
    cases = {row.case for row in rows}
    rows = [row for row in all_rows() if row in rows or (row.engine == SINGLE and row.case in cases)]
    with tempfile.TemporaryDirectory() as folder:
        board = Board(args, Path(folder), console)
        board.run(rows)
    found = [board.rows[row.name]["status"] for row in rows]
    counts = {status: found.count(status) for status in dict.fromkeys(found)}
    console.print(f"{', '.join(f'{count} {status}' for status, count in counts.items())}; {args.output}")
    return 1 if {"failed", "differs"} & counts.keys() or board.late else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", default=[], metavar="PART", help="only rows whose name has one of these parts")
    add("--list", action="store_true", help="print the rows' names and run nothing")
    add("--parallel", type=int, metavar="N", help="rows at a time; default: one for three CPU cores")
    add("--steps", type=int, default=4, help="of each row")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--bound", type=float, help=f"of the difference of losses; default: {BOUNDS}")
    add("--patience", type=float, default=300, metavar="SECONDS", help="a row that takes longer is ended")
    add("--minutes", type=float, default=math.inf, help="start no further row after this time")
    add("--again", action="store_true", help="run rows anew that the CSV has")
    add("--logs", type=Path, help="folder for the output of each row; default: of rows that failed, beside the CSV")
    add("--output", type=Path, help="default: benchmarks/results/launch_matrix_MACHINE_xGPUS.csv")
    args = parser.parse_args(arguments)
    if args.steps < 1 or (args.parallel is not None and args.parallel < 1):
        parser.error("--steps and --parallel must be at least 1")
    args.parallel = args.parallel or max(1, (os.cpu_count() or 1) // 3)
    args.precision = "bfloat16" if args.bf16 else "float32"
    args.bound = BOUNDS[args.precision] if args.bound is None else args.bound
    gpus = count_gpus()
    machine = f"{harness.name_of_machine()}{f'_x{gpus}' if gpus > 1 else ''}"
    args.output = args.output or Path("benchmarks/results") / f"launch_matrix_{machine}.csv"
    return args


class Board:
    """The rows that are done, and how the others are run."""

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console) -> None:
        self.args, self.folder, self.console = args, folder, console
        self.gpus = count_gpus()
        self.machine = harness.describe_machine(*VERSIONS)
        self.ports = Ports()
        self.deadline = harness.Deadline(args.minutes)
        self.late = False
        self.cards = 0
        self.rows: dict[str, dict[str, Any]] = {}
        if args.output.is_file():
            found = [row for row in harness.read_rows(args.output) if self._is_of_this_machine(row)]
            # The bound may be another now. One process's rows are compared with none.
            judged = (
                row | judge(row["losses"], row["single"], "ok", args.bound)
                if row["status"] in ("ok", "differs") and row["single"]
                else dict(row)
                for row in found
            )
            self.rows = {"/".join(row[name] for name in COLUMNS[:4]): row for row in judged}
        setting = {"on_gpus": self.gpus > 0, "bf16": args.bf16, "steps": args.steps, "save_steps": args.steps}
        self.setting = Setting(materials=make_materials(folder / "materials"), **setting)

    def run(self, rows: Sequence[Row]) -> None:
        """Runs the rows that have no result yet, or all of them anew."""
        waiting = []
        for row in rows:
            why = why_not(row, self.gpus)
            if why:
                self._note(row, {"status": "not run", "reason": why})
            elif self.args.again or self.rows.get(row.name, {}).get("status") not in DONE:
                waiting.append(row)
        args = self.args
        late = run_together(
            waiting, args.parallel, self._begin, self._done, args.patience, lambda: self.deadline.passed
        )
        for row in late:
            self._note(row, {"status": "not run", "reason": f"not reached within {args.minutes:g} minutes"})
        self.late = bool(late)

    def _begin(self, row: Row) -> Started:
        output = self.folder / row.name
        words = command_line(row, self.setting, output, self.ports.take())
        variables = {}
        if ENGINES[row.engine].processes == 1 and "device_map" not in " ".join(words) and self.gpus:
            self.cards += 1  # one GPU each, in turn
            variables["CUDA_VISIBLE_DEVICES"] = names_of_gpus()[self.cards % self.gpus]
        return start(words, self.folder / f"{row.name}.log", **variables)

    def _done(self, row: Row, started: Started, seconds: float, hung: bool) -> None:
        output = self.folder / row.name
        code = started.process.returncode
        found: dict[str, Any] = {"seconds": round(seconds, 1)}
        words = command_line(row, self.setting, output)
        found["typed"] = as_typed(words, self.setting, output)
        if hung:
            found |= {"status": "failed", "reason": f"no end after {self.args.patience:g} s"}
        elif code == REFUSED:
            found |= {"status": "refused", "reason": last_line(started.log, row.case.command)}
        elif code:
            found |= {"status": "failed", "reason": f"exit code {code}: {last_line(started.log, row.case.command)}"}
        else:
            found |= read_losses(output, self.setting.steps)
        self._note(row, found, started.log)

    def _note(self, row: Row, found: dict[str, Any], log: Path | None = None) -> None:
        """Writes a row and, where it is a single process, judges those that waited for it."""
        named = dict(zip(COLUMNS, row.case, strict=False)) | {"engine": row.engine, "steps": self.args.steps}
        named |= {"precision": self.args.precision, "gpus": self.gpus}
        entry = dict.fromkeys(COLUMNS, "") | named | found | self.machine
        self.rows[row.name] = entry
        pending = [entry]
        if row.engine == SINGLE:
            same = [other for other in self.rows.values() if tuple(other[name] for name in COLUMNS[:3]) == row.case]
            pending += [other for other in same if other["status"] == "waiting" and other is not entry]
        single = self.rows.get(Row(row.case, SINGLE).name, {})
        for other in pending:
            if other["losses"]:
                other |= judge(other["losses"], single.get("losses", ""), single.get("status", ""), self.args.bound)
            if other["status"] != "waiting":
                self._say(other, log if other is entry else None)
        self._write()

    def _say(self, entry: dict[str, Any], log: Path | None) -> None:
        name = "/".join(entry[column] for column in COLUMNS[:4])
        said = f"{entry['status']:<8} {name:<45} {entry['seconds'] or '':>6} s  " if entry["seconds"] else ""
        said = said or f"{entry['status']:<8} {name:<45} {'':>8}  "
        told = f"difference {entry['difference']}" if entry["difference"] != "" else entry["reason"]
        self.console.print(said + f"{told}", soft_wrap=True)
        folder = self.args.logs or (self.args.output.with_suffix("") if entry["status"] == "failed" else None)
        if log is not None and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name.replace('/', '_')}.log").write_bytes(log.read_bytes())

    def _write(self) -> None:
        ordered = [self.rows[row.name] for row in all_rows() if row.name in self.rows]
        harness.write_rows(self.args.output, ordered)

    def _is_of_this_machine(self, row: dict[str, str]) -> bool:
        """Whether a row of a CSV may stand beside new ones; another machine's, precision's or number of steps' not."""
        same = {"steps": str(self.args.steps), "precision": self.args.precision, "gpus": str(self.gpus)}
        same |= {name: version for name, version in self.machine.items() if name != "date"}
        return all(row.get(name) == value for name, value in same.items())


def why_not(row: Row, gpus: int) -> str:
    """Why a row can't be run on this machine; empty where it can."""
    engine = ENGINES[row.engine]
    if gpus == 0 and engine.on_cpu is None:
        return "needs two GPUs; here are none"
    if gpus == 1 and (engine.processes > 1 or engine.on_cpu is None):
        return "needs two GPUs; here is one"
    return ""


def read_losses(output: Path, steps: int) -> dict[str, Any]:
    """The logged loss of each step, from the last checkpoint of a run."""
    file = output / f"checkpoint-{steps}" / "trainer_state.json"
    if not file.is_file():
        return {"status": "failed", "reason": f"it wrote no checkpoint of its last step, {steps}"}
    log = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if len(losses) != steps:
        return {"status": "failed", "reason": f"it logged {len(losses)} losses in {steps} steps"}
    return {"status": "waiting", "losses": " ".join(f"{loss:.8g}" for loss in losses)}


def judge(losses: str, single: str, status: str, bound: float) -> dict[str, Any]:
    """Status, largest difference and bound of a row's losses beside those of the single process.

    Args:
        losses: Of the row, with spaces between them.
        single: The same of one process; empty while it has none.
        status: Of the single process's row; empty where it has not ended.
        bound: The largest difference that is rounding.
    """
    if not single:
        if status in ("", "waiting"):
            return {"status": "waiting"}
        return {"status": "failed", "reason": f"the single process, which it is compared with, was {status}"}
    pairs = zip(map(float, losses.split()), map(float, single.split()), strict=True)
    # A difference that is not a number is none that is within a bound.
    difference = max((abs(left - right) for left, right in pairs), key=lambda value: (math.isnan(value), value))
    found = {"difference": float(f"{difference:.3g}"), "bound": bound, "single": single}
    return {**found, "status": "ok" if difference <= bound else "differs"}


if __name__ == "__main__":
    raise SystemExit(main())
