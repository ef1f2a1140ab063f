"""Starting commands side by side, each in a group of its own, and ending all that one has started."""

import itertools
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

MARK = "OTPO_BENCHMARK_RUN"
"""In the environment of all processes of a command: torch's launcher gives each of its own a new session."""
_PATIENCE = 15.0  # seconds in which a process that was told to end does so


class Started(NamedTuple):
    """A command that runs, and what tells its processes from all others."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    begin: float


def start(words: Sequence[str], log: Path, **variables: str) -> Started:
    """Starts a command whose output goes into a file.

    Args:
        words: Of the command.
        log: The file.
        **variables: More of the environment.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", MARK: mark, **variables}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with log.open("wb") as file:
        begin = time.monotonic()
        process = subprocess.Popen(
            list(words), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return Started(process, mark, log, begin)


def members(mark: str) -> list[psutil.Process]:
    """All live processes of a command, those of its launcher's sessions too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def kill(started: Started) -> int:
    """SIGKILL for all processes of a command at once, as when a machine stops; returns how many there were."""
    count = 0
    while alive := members(started.mark):  # one that was being born comes in the next round
        # They are halted first, so that none sees another one end and does something about it.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in alive:
                with suppress(psutil.Error):
                    process.send_signal(number)
        count += len(alive)
        psutil.wait_procs(alive, timeout=_PATIENCE)
    started.process.wait()
    return count


def end(started: Started) -> None:
    """Ends a command that hangs: by Ctrl-C's signal, and after a while by SIGKILL."""
    for process in members(started.mark):
        with suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        started.process.wait(_PATIENCE)
    kill(started)


def run_together(
    jobs: Sequence[Job],
    parallel: int,
    begin: Callable[[Job], Started],
    done: Callable[[Job, Started, float, bool], None],
    patience: float,
    late: Callable[[], bool] = lambda: False,
) -> list[Job]:
    """Runs jobs, so many at a time, in their order.

    Args:
        jobs: Of any kind.
        parallel: How many run at a time.
        begin: Starts a job.
        done: Told of a job that has ended: the job, what was started, its seconds, and whether it had to be ended.
        patience: Seconds that a job may take.
        late: Whether no further job is to begin.

    Returns:
        The jobs that were not begun.
    """
    waiting, running = list(jobs), {}
    try:
        while running or (waiting and not late()):
            while waiting and len(running) < parallel and not late():
                job = waiting.pop(0)
                started = begin(job)
                running[started.mark] = (job, started)
            time.sleep(0.05)
            for job, started in list(running.values()):
                seconds = time.monotonic() - started.begin
                hangs = started.process.poll() is None and seconds > patience
                if hangs:
                    end(started)
                if started.process.poll() is not None:
                    del running[started.mark]
                    done(job, started, seconds, hangs)
    finally:
        for _, started in running.values():
            end(started)
    return waiting


class Ports:
    """Free ports of this machine, a new one at each call, from any thread."""

    def __init__(self, first: int | None = None) -> None:
        self._numbers = itertools.count(1 + (first or 20_000 + os.getpid() % 20_000))  # whose steps threads share

    def take(self) -> int:
        """One that nobody listens on."""
        while True:
            port = next(self._numbers)
            with socket.socket() as tried, suppress(OSError):
                tried.bind(("localhost", port))
                return port


def count_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def names_of_gpus() -> list[str]:
    """These GPUs, each as `CUDA_VISIBLE_DEVICES` names it to a process that is to see it alone."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    numbers = range(count_gpus())
    return [named[number] if named else str(number) for number in numbers]


def last_line(log: Path, command: str) -> str:
    """What a command said it failed of: its own line if there is one, else the last line of its output."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(f"otpo {command}: error: ")]
    return (own or lines or ["no output"])[-1].removeprefix(f"otpo {command}: error: ")


def side_by_side(
    function: Callable[[Job], Result], jobs: Sequence[Job], parallel: int
) -> Iterator[tuple[Job, Result]]:
    """Calls a function that starts processes and waits for them, for so many jobs at a time.

    The function is called in threads. What it finds comes to the caller's own thread, which alone may keep books. Once
    a job has raised, or the caller has stopped, no other job begins, and those that run are waited for.

    Args:
        function: Returns what is found of a job.
        jobs: What to call it with.
        parallel: How many of them at a time.

    Yields:
        Each job and what was found of it, in the order in which they end.
    """
    pool = ThreadPoolExecutor(max_workers=parallel)
    try:
        running = {pool.submit(function, job): job for job in jobs}
        for ended in as_completed(running):
            yield running[ended], ended.result()
    finally:
        pool.shutdown(cancel_futures=True)
