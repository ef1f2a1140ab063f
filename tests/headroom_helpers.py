"""What does the jobs of `benchmarks.headroom` in tests of its processes, which import this module."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.headroom.plan import Job, Plan, result_path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finish(plan: Plan, job: Job) -> None:
    path = result_path(plan, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pid": os.getpid()}))


def crowding(plan: Plan) -> Callable[[Job], None]:
    """A process has memory for its jobs as long as at most `samples` others that began do still run."""

    def do(job: Job) -> None:
        begun = plan.folder / "begun"
        begun.mkdir(exist_ok=True)
        (begun / str(os.getpid())).touch()
        time.sleep(0.3)
        if sum(is_alive(int(each.name)) for each in begun.iterdir()) > plan.samples:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finish(plan, job)

    return do


def endless(plan: Plan) -> Callable[[Job], None]:
    """The first job takes longer than any test."""

    def do(job: Job) -> None:
        finish(plan, job)
        if job.kind != "start":
            time.sleep(600)

    return do
