"""One training that runs to its end, and one that is killed at a moment and resumed."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from otpo.cli.running.checkpoints import newest_checkpoint
from otpo.cli.running.identity import RUN_FILE

from .commands import Row, Setting, command_line
from .processes import Ports, Started, end, kill, last_line, start

Result = tuple[dict[int, float], dict[str, torch.Tensor]]
"""The logged loss of each step, and what was saved at the end."""
_TRIES = 4  # moments until a run is hit before it has ended
_LOOK = 0.002  # seconds between two looks at a run's folder


PARTS = ("start", "training", "end")
"""Until training begins; until the last step's checkpoint is written; until the command has ended."""


class Draw(NamedTuple):
    """A kill.

    Attributes:
        number: Of the kill.
        row: What is trained, and how.
        part: One of [`PARTS`], in which it is killed.
        share: Of the time of that part, from 0 to 1.
    """

    number: int
    row: Row
    part: str
    share: float


class Moments(NamedTuple):
    """What an uninterrupted run took, in seconds, what came out of it, and by how much another one differs."""

    begun: float
    trained: float
    ended: float
    result: Result
    noise: tuple[float, float]

    def describe(self) -> str:
        """In a line."""
        losses, weights = self.noise
        told = f"training began after {self.begun:.1f} s, its last checkpoint was written after {self.trained:.1f} s, "
        told += f"all took {self.ended:.1f} s"
        return f"{told}; another one differs by {losses:.3g} in losses, {weights:.3g} in weights"


def run_uninterrupted(
    row: Row, setting: Setting, folder: Path, ports: Ports, runs: int, patience: float
) -> Moments | str:
    """Runs a row to its end so many times; what its first run took, or what went wrong."""
    found: list[Result] = []
    begun = trained = ended = 0.0
    for number in range(runs):
        output = folder / row.name / str(number)
        started = start(command_line(row, setting, output, ports.take()), output.with_suffix(".log"))
        last = output / f"checkpoint-{setting.steps}" / TRAINER_STATE_NAME
        times = [_watch(started, file, patience) for file in (output / RUN_FILE, last, None)]
        if started.process.returncode != 0:
            return f"exit code {started.process.returncode}: {last_line(started.log, row.case.command)}"
        try:
            found.append(read_result(output, setting.steps))
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        if number == 0:
            begun, trained, ended = times
    noise = [differences(found[0], other) for other in found[1:]]
    worst = (max((each[0] for each in noise), default=0.0), max((each[1] for each in noise), default=0.0))
    return Moments(begun, trained, ended, found[0], worst)


class KilledRun:
    """A run that is killed once, and resumed until it ends."""

    def __init__(
        self, draw: Draw, setting: Setting, folder: Path, ports: Ports, moments: Moments, patience: float
    ) -> None:
        self.draw, self.setting, self.folder, self.ports = draw, setting, folder, ports
        self.moments, self.patience = moments, patience

    def run(self) -> dict[str, Any]:
        """What a row of the CSV says of it; its `result`, or a `status` and a `reason` where it has none."""
        command = self.draw.row.case.command
        begin = time.monotonic()
        for attempt in range(_TRIES):
            output = self.folder / str(attempt)
            # A run that was faster than the uninterrupted one and has ended is tried again, at half the time.
            share = self.draw.share * 0.5**attempt
            moment, count = self._kill(output, share)
            if count:
                break
        else:
            return {
                "status": "failed",
                "reason": f"{_TRIES} runs ended before their moment, the last after {moment} s",
            }
        found: dict[str, Any] = {
            "moment_s": round(moment, 2),
            "killed": count,
            "phase": phase(output, self.setting.steps),
        }
        whole = newest_checkpoint(str(output))
        found["resumed_from"] = 0 if whole is None else int(whole.rpartition("-")[2])
        words = command_line(self.draw.row, self.setting, output, self.ports.take())
        words += [] if whole is None else ["--resume_from_checkpoint", "true"]
        started = start(words, self.folder / "resumed.log")
        _watch(started, None, self.patience)
        found["seconds"] = round(time.monotonic() - begin, 1)
        if started.process.returncode != 0:
            said = last_line(started.log, command)
            return {**found, "status": "failed", "reason": f"exit code {started.process.returncode}: {said}"}
        try:
            return {**found, "result": read_result(output, self.setting.steps)}
        except (OSError, ValueError) as error:
            return {**found, "status": "failed", "reason": f"{type(error).__name__}: {error}"}

    def _kill(self, output: Path, share: float) -> tuple[float, int]:
        """When the run was killed, in seconds, and how many processes; none where it had ended before."""
        words = command_line(self.draw.row, self.setting, output, self.ports.take())
        started = start(words, output.with_suffix(".log"))
        begun, trained, ended = self.moments[:3]
        if self.draw.part == "start":
            wait = share * begun
        elif self.draw.part == "training":
            _watch(started, output / RUN_FILE, self.patience)
            wait = share * (trained - begun)
        else:
            _watch(started, output / f"checkpoint-{self.setting.steps}" / TRAINER_STATE_NAME, self.patience)
            wait = share * (ended - trained)
        until = time.monotonic() + wait
        while time.monotonic() < until and started.process.poll() is None:
            time.sleep(_LOOK)
        moment = time.monotonic() - started.begin
        return moment, kill(started) if started.process.poll() is None else 0


def _watch(started: Started, file: Path | None, patience: float) -> float:
    """Waits until a run has written a file or has ended; returns the seconds since its start."""
    while started.process.poll() is None and not (file is not None and file.is_file()):
        if time.monotonic() - started.begin > patience:
            end(started)
        time.sleep(_LOOK)
    return time.monotonic() - started.begin


def phase(output: Path, steps: int) -> str:
    """What a kill has left in a run's folder."""
    folders = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    whole = newest_checkpoint(str(output))
    newest = max((int(path.name.rpartition("-")[2]) for path in folders), default=0)
    if newest and (whole is None or newest != int(whole.rpartition("-")[2])):
        return "while saving a checkpoint"
    if whole is None:
        return "before the first checkpoint"
    return "after the last checkpoint" if newest >= steps else "between checkpoints"


def read_result(output: Path, steps: int) -> Result:
    """The losses of a run that has ended, and what it saved, by name.

    Raises:
        OSError: A file is missing.
        ValueError: There are no weights.
    """
    state = json.loads((output / f"checkpoint-{steps}" / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        weights |= load_file(file)
    if not weights:
        raise ValueError(f"{output.name} has no weights")
    return losses, weights


def differences(left: Result, right: Result) -> tuple[float, float]:
    """The largest difference of losses and of weights; infinite where one has what the other has not."""
    (losses, weights), (other_losses, other_weights) = left, right
    if losses.keys() != other_losses.keys() or weights.keys() != other_weights.keys():
        return math.inf, math.inf
    if any(weights[name].shape != other_weights[name].shape for name in weights):
        return math.inf, math.inf
    of_losses = [abs(losses[step] - other_losses[step]) for step in losses]
    apart = [(weights[name].double() - other_weights[name].double()).abs() for name in weights]
    of_weights = [float(tensor.max()) for tensor in apart if tensor.numel()]
    return _largest(of_losses), _largest(of_weights)


def _largest(values: list[float]) -> float:
    return max(values, key=lambda value: (math.isnan(value), value), default=math.inf)
