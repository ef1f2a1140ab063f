"""What every benchmark here shares: time and memory on the device, the machine's description, the CSV, its gaps."""

import csv
import datetime
import importlib.metadata
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from moe_backbone.planning.hardware import GPUS

MIB = 2**20


class Measured(NamedTuple):
    """Median time of a call, the most memory it took beyond what was there, and how much of that it gave back."""

    ms: float
    peak_mib: float
    temporaries_mib: float


def measure(run: Callable[[], Any], *, seconds: float = 0.3, most: int = 20) -> tuple[float, float]:
    """Median time in ms and peak extra memory in MiB of `run`, which has been called before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times: list[float] = []
    while len(times) < most and sum(times) < 1e3 * seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / MIB


def measure_device(
    run: Callable[[], Any], *, cold: bool = False, calls: int = 5, seconds: float = 0.3, most: int = 9
) -> Measured:
    """What `run`, which has been called before, takes on the device: calls queue up behind a sleep, host ahead.

    A `run` that waits for the device itself cannot be queued, and its waits count.

    Args:
        cold: Whether every call finds the L2 cache full of other things; otherwise the first of `calls` does, and
            the rest follow back to back.
        seconds: Start no further sample after so much time on the device; there are three at least.
    """
    other_things = torch.empty(256 * MIB, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    cycles, longest = 2**21, 2**27  # about 1 ms and 70 ms
    times: list[float] = []
    while len(times) < 3 or (len(times) < most and calls * sum(times) < 1e3 * seconds):
        spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda._sleep(cycles)
        for i, (start, end) in enumerate(spans):
            if cold or i == 0:
                other_things.zero_()
                start.record()
            run()
            if cold or i == calls - 1:
                end.record()
        overtaken = spans[0][0].query()
        torch.cuda.synchronize()
        if overtaken and cycles < longest:
            cycles *= 4
        elif cold:
            times.append(statistics.median(start.elapsed_time(end) for start, end in spans))
        else:
            times.append(spans[0][0].elapsed_time(spans[-1][1]) / calls)
    return Measured(statistics.median(times), (peak - before) / MIB, (peak - after) / MIB)


def describe_machine(*packages: str) -> dict[str, str]:
    """GPU, versions and date, for every line of a CSV."""
    versions = {name: _version(name) for name in ("torch", "triton", *packages)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, **versions, "date": datetime.date.today().isoformat()}


def name_of_gpu() -> str:
    """The key of this GPU's data sheet; an H100's if there is none, which is then no matter for memory."""
    title = torch.cuda.get_device_name().lower()
    if "pcie" in title and "h100" in title:
        return "h100-pcie"
    return next((name for name in GPUS if name in title), "h100")


def name_of_machine() -> str:
    """[`name_of_gpu`], or `"cpu"` without one."""
    return name_of_gpu() if torch.cuda.is_available() else "cpu"


def write_rows(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Writes rows that share their keys as CSV; without rows, which have no keys, `columns` names them.

    A benchmark that is killed while it writes leaves the file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV by column name."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reason(error: BaseException) -> str:
    """One line on why a contender has no time."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def print_missing(rows: list[dict], columns: tuple[str, ...], console: Console) -> None:
    """Who has no time for some reason, and how often."""
    for missing, times in Counter(tuple(r[name] for name in columns) for r in rows if r["status"] != "ok").items():
        console.print(f"no time ({times} rows): {': '.join(missing)}")


class Deadline:
    """When to start nothing more."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
