"""What every benchmark here shares: timing on the device, memory, the machine's description, the CSV."""

import csv
import datetime
import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


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
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20


def describe_machine(*packages: str) -> dict[str, str]:
    """GPU, versions and date, for every line of a CSV."""
    versions = {name: _version(name) for name in ("torch", "triton", *packages)}
    return {"gpu": torch.cuda.get_device_name(), **versions, "date": datetime.date.today().isoformat()}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows that share their keys as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV by column name."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
