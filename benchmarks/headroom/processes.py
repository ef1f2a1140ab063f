"""Jobs over processes: each has one GPU, several may share one; whoever is free takes the first job that can run."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch

from benchmarks.launching.processes import names_of_gpus

from .plan import Job, Plan, result_path


class Failure(NamedTuple):
    """A job that has no result, and why."""

    job: Job
    reason: str


def devices_of(plan: Plan, per_gpu: int) -> list[str]:
    """The GPU of each process, as `CUDA_VISIBLE_DEVICES` names it; one process without a name on the CPU."""
    if plan.use_cpu or not torch.cuda.is_available():
        return [""]
    return [gpu for _ in range(per_gpu) for gpu in names_of_gpus()]


def run_jobs(
    plan: Plan,
    jobs: Sequence[Job],
    devices: Sequence[str],
    say: Callable[[str], None],
    seconds: float = float("inf"),
) -> list[Failure]:
    """Does the jobs that have no result yet; those that need a failed one fail too.

    A process that dies takes its job with it, and the others go on. One device alone is this process's.

    Args:
        plan: The options.
        jobs: All of them.
        devices: Of each process, see [`devices_of`].
        say: Told of each job that is done or has failed.
        seconds: No further job begins after so many.
    """
    board = _Board(plan, jobs, say, seconds)
    if len(devices) == 1:
        _alone(plan, board)
    elif board.waiting:
        _together(plan, board, devices)
    return board.failures + [Failure(job, "not reached in time") for job in board.late]


class _Board:
    """Which jobs wait, and which have failed."""

    def __init__(self, plan: Plan, jobs: Sequence[Job], say: Callable[[str], None], seconds: float) -> None:
        self.plan, self.say, self.seconds = plan, say, seconds
        self.late: list[Job] = []
        self.waiting = [job for job in jobs if not result_path(plan, job).is_file()]
        self.failures: list[Failure] = []
        self.begin = time.monotonic()

    def take(self) -> Job | None:
        """The first job whose need is there; None where all that wait need one that is being done, or it is late."""
        if time.monotonic() - self.begin >= self.seconds:
            self.late += self.waiting
            self.waiting.clear()
        for job in list(self.waiting):
            need = job.needs
            if need is not None and any(failure.job == need for failure in self.failures):
                self.waiting.remove(job)
                self.note(job, f"{need.name} failed")
            elif need is None or result_path(self.plan, need).is_file():
                self.waiting.remove(job)
                return job
        return None

    def note(self, job: Job, problem: str) -> None:
        """A job's end; `problem` is empty where it is done."""
        if problem:
            self.failures.append(Failure(job, problem))
        passed = time.monotonic() - self.begin
        self.say(f"{passed:6.0f} s  {job.name}{f': failed: {problem}' if problem else ''}  ({len(self.waiting)} wait)")


def _alone(plan: Plan, board: _Board) -> None:
    from .worker import Worker

    worker = Worker(plan)
    while (job := board.take()) is not None:
        board.note(job, _done(worker, job))


def _together(plan: Plan, board: _Board, devices: Sequence[str]) -> None:
    context = multiprocessing.get_context("spawn")
    kept = os.environ.get("CUDA_VISIBLE_DEVICES")
    members: dict[Any, Any] = {}
    busy: dict[Any, Job] = {}
    try:
        for device in devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = device  # the process starts with it
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(plan, there), daemon=True)
            process.start()
            there.close()
            members[here] = process
    finally:
        if kept is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = kept
    while members:
        for line in [line for line in members if line not in busy]:
            job = board.take()
            if job is None:
                break
            try:
                line.send(job)
            except OSError:  # the process ended between two jobs, or before its first: another one takes the job
                members.pop(line).join()
                board.waiting.insert(0, job)
                continue
            busy[line] = job
        if not busy:
            break
        ready: list[Any] = wait(list(busy))
        for line in ready:
            job = busy.pop(line)
            try:
                board.note(job, line.recv())
            except (EOFError, OSError):
                members[line].join()
                board.note(job, f"its process ended with {members.pop(line).exitcode}")
    for job in board.waiting:
        board.failures.append(Failure(job, "no process was left"))
    for line, process in members.items():
        with contextlib.suppress(OSError):  # it has ended by itself
            line.send(None)
        process.join()


def _serve(plan: Plan, line: Any) -> None:
    """A process's life: jobs until there are none."""
    from .worker import Worker

    torch.set_num_threads(2)
    worker = Worker(plan)
    while (job := line.recv()) is not None:
        line.send(_done(worker, job))


def _done(worker: Any, job: Job) -> str:
    """Does a job; what went wrong, or nothing."""
    from .worker import run_job

    try:
        run_job(worker, job)
    except Exception as error:  # one job's, whatever it is; the others go on
        if os.environ.get("OTPO_TRACEBACK"):
            traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
