"""What the profiler saw on the device: its kernels one by one, and how long any of them ran."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
STAND_INS = {"cpu_op"}
"""Categories of a trace. On the CPU calls stand for kernels, one in the other, which is good for tests alone."""


def kernels_of(profile: Any, *, on_gpu: bool) -> list[dict[str, Any]]:
    """Kernels and copies of a finished `torch.profiler.profile`, `{name, ts, dur}` with times in microseconds.

    Ranges that a program names are left out: they span the waits between kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    wanted = ON_DEVICE if on_gpu else STAND_INS
    return [event for event in events if event.get("cat") in wanted]


def busy_time(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one of the events ran."""
    busy, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        finished = event["ts"] + event["dur"]
        busy += max(0.0, finished - max(event["ts"], end))
        end = max(end, finished)
    return busy


def largest_groups(profile: Any, count: int, *, on_gpu: bool) -> str:
    """The kernels that took longest, all calls of a name together: ms, share, calls and name, one a line."""
    total_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    groups = sorted(profile.key_averages(), key=lambda group: -getattr(group, total_of))
    total = sum(getattr(group, total_of) for group in groups) or 1.0
    lines = [f"{'ms':>10} {'share':>6} {'calls':>7}  kernel"]
    for group in groups[:count]:
        spent = getattr(group, total_of)
        lines.append(f"{spent / 1e3:10.2f} {spent / total:6.1%} {group.count:7d}  {group.key[:120]}")
    return "\n".join(lines) + "\n"
