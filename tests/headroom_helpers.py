"""What does the jobs of `benchmarks.headroom` in tests of its processes, which import this module."""

import contextlib
import json
import os
import time
from collections.abc import Callable

import psutil
import torch

from benchmarks.headroom.plan import Job, Plan, result_path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def finish(plan: Plan, job: Job) -> None:
    path = result_path(plan, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}))


def crowding(plan: Plan) -> Callable[[Job], None]:
    """A process has memory for a job where no more than `samples` of its GPU that began are alive, itself included."""

    def do(job: Job) -> None:
        begun = plan.folder / f"begun_{os.environ.get('CUDA_VISIBLE_DEVICES')}"
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
