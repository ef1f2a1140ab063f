"""Jobs over processes: each has one GPU, several may share one; whoever is free takes the first job that can run.

How many processes fit a GPU shows only as they work. One that finds no memory gives its job back and ends, so that
those beside it on that GPU have its share; the job fails if its process had the GPU to itself.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch

from benchmarks.launching.processes import names_of_gpus

from .plan import Job, Plan, result_path

Doer = Callable[[Job], None]
"""Does a job and writes its result."""


class Failure(NamedTuple):
    """A job that has no result, and why."""

    job: Job
    reason: str


class Ended(NamedTuple):
    """How a job ended: with a problem or, where that is empty, with a result; `crowded` if memory was the problem."""

    problem: str
    crowded: bool = False


class Member(NamedTuple):
    """A process and its GPU."""

    process: Any
    device: str


def devices_of(plan: Plan, per_gpu: int) -> list[str]:
    """The GPU of each process, as `CUDA_VISIBLE_DEVICES` names it; one process without a name on the CPU."""
    if plan.use_cpu or not torch.cuda.is_available():
        return [""]
    return [gpu for _ in range(per_gpu) for gpu in names_of_gpus()]


def make_worker(plan: Plan) -> Doer:
    """What does jobs, with models that stay loaded."""
    from .worker import Worker, run_job

    return functools.partial(run_job, Worker(plan))


def run_jobs(
    plan: Plan,
    jobs: Sequence[Job],
    devices: Sequence[str],
    say: Callable[[str], None],
    seconds: float = float("inf"),
    make_doer: Callable[[Plan], Doer] = make_worker,
) -> list[Failure]:
    """Does the jobs that have no result yet; those that need a failed one fail too.

    A process that dies takes its job with it, and the others go on. One device alone is this process's.

    Args:
        plan: The options.
        jobs: All of them.
        devices: Of each process, see [`devices_of`].
        say: Told of each job that is done or has failed.
        seconds: No further job begins after so many.
        make_doer: Makes what does the jobs of a process; a function of a module, which is imported there.
    """
    board = _Board(plan, jobs, say, seconds)
    if len(devices) == 1:
        do = make_doer(plan)
        while (job := board.take()) is not None:
            board.note(job, _done(do, job).problem)
    elif board.waiting:
        _together(plan, board, devices, make_doer)
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
        self._tell(job, f": failed: {problem}" if problem else "")

    def give_back(self, job: Job, why: str) -> None:
        """A job that another process is to do."""
        self.waiting.insert(0, job)
        self._tell(job, f": given back: {why}")

    def _tell(self, job: Job, what: str) -> None:
        self.say(f"{time.monotonic() - self.begin:6.0f} s  {job.name}{what}  ({len(self.waiting)} wait)")


def _together(plan: Plan, board: _Board, devices: Sequence[str], make_doer: Callable[[Plan], Doer]) -> None:
    context = multiprocessing.get_context("spawn")
    kept = os.environ.get("CUDA_VISIBLE_DEVICES")
    members: dict[Any, Member] = {}
    busy: dict[Any, tuple[Job, int]] = {}  # a job, and the number of processes on its GPU when it began

    def sharing(device: str) -> int:
        return sum(member.device == device for member in members.values())

    try:
        for device in devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = device  # the process starts with it
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(plan, there, make_doer), daemon=True)
            process.start()
            there.close()
            members[here] = Member(process, device)
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
                members.pop(line).process.join()
                board.waiting.insert(0, job)
                continue
            busy[line] = job, sharing(members[line].device)
        if not busy:
            break
        ready: list[Any] = wait(list(busy))
        for line in ready:
            job, beside = busy.pop(line)
            try:
                ended = line.recv()
            except (EOFError, OSError):
                process = members.pop(line).process
                process.join()
                board.note(job, f"its process ended with {process.exitcode}")
                continue
            if not ended.crowded or beside == 1:
                board.note(job, ended.problem)
                continue
            process, device = members[line]
            if sharing(device) == beside:  # or another one has made room since, and this one tries again
                del members[line]
                _let_go(line, process)
            board.give_back(job, f"{ended.problem} Processes that stay on its GPU: {sharing(device)}.")
    for job in board.waiting:
        board.failures.append(Failure(job, "no process was left"))
    for line, (process, _) in members.items():
        _let_go(line, process)


def _let_go(line: Any, process: Any) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        line.send(None)
    process.join()


def _serve(plan: Plan, line: Any, make_doer: Callable[[Plan], Doer]) -> None:
    """A process's life: jobs until there are none, or until the command's process is gone, killed or not."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(2)
    doer = functools.cache(lambda: make_doer(plan))  # made as the first job begins, which may find no memory either
    while (job := line.recv()) is not None:
        line.send(_done(lambda job: doer()(job), job))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _done(do: Doer, job: Job) -> Ended:
    """Does a job; what went wrong, or nothing."""
    try:
        do(job)
        return Ended("")
    except Exception as error:  # one job's, whatever it is; the others go on
        if os.environ.get("OTPO_TRACEBACK"):
            traceback.print_exc()
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ended = Ended(problem, _lacks_memory(error))
    if ended.crowded:
        gc.collect()  # what the frames of the error held
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return ended


def _lacks_memory(error: Exception) -> bool:
    """Whether a GPU had no memory: torch's allocator, CUDA itself, one of its libraries or Triton says so."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "ALLOC_FAILED" in told
