"""What launched processes failed of: each notes it, and the one that launched them says the first as its last line.

A process that raises writes its error, with the time, into a folder that the launcher made. One that fails after
another, such as of a connection that the other one closed, says so in a line of its own. torch's launcher knows less:
which process it saw end first, and its exit code.
"""

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console

from otpo.cli.options.redact import redact_text

FOLDER = "OTPO_FAILURES"
"""Set in the environment of processes that `otpo` launched: the folder of their notes."""
_TORCHS_FILE = "TORCHELASTIC_ERROR_FILE"


class Failure(NamedTuple):
    """What a process noted.

    Attributes:
        attempt: How often its launcher had started all of them anew.
        time: When it failed, in seconds.
        rank: Of all processes.
        message: What its line says.
        refused: Whether it is a refusal, which is complete in a line, and no fault of the program.
    """

    attempt: int
    time: float
    rank: int
    message: str
    refused: bool


def rank() -> int:
    """This process's number among all that were launched; 0 for one alone."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def note(message: str, error: BaseException, *, refused: bool) -> Failure | None:
    """Notes a failure of this process, for torch's launcher too where that one began it.

    Args:
        message: What the launcher's line is to say, without secrets.
        error: What was raised.
        refused: See [`Failure`].

    Returns:
        The failure; None where no launcher of ours will read it.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    failure = Failure(attempt, time.time(), rank(), message, refused)
    torchs = os.environ.get(_TORCHS_FILE)
    if torchs:
        trace = message if refused else redact_text("".join(traceback.format_exception(error)))
        extra = {"py_callstack": trace, "timestamp": str(int(failure.time))}
        with suppress(OSError):  # it tells less then
            Path(torchs).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    try:
        part = Path(folder) / f"{socket.gethostname()}-{os.getpid()}.part"
        part.write_text(json.dumps(failure._asdict()), encoding="utf-8")
        part.replace(part.with_suffix(".json"))
    except OSError:
        return None
    return failure


def noted(folder: str | Path) -> list[Failure]:
    """All failures of the last attempt in a folder, the first one first."""
    found = []
    for path in Path(folder).glob("*.json"):
        with suppress(OSError, ValueError, TypeError):  # the disk may be what is full
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    last = max((failure.attempt for failure in found), default=0)
    return sorted(failure for failure in found if failure.attempt == last)


def came_later(failure: Failure) -> bool:
    """Whether another process had failed before."""
    return noted(os.environ[FOLDER])[:1] not in ([], [failure])


@contextmanager
def collected() -> Iterator[str]:
    """A folder for the notes of the processes that are launched inside the block."""
    with TemporaryDirectory(prefix="otpo_failures_") as folder:
        os.environ[FOLDER] = folder
        try:
            yield folder
        finally:
            del os.environ[FOLDER]


def outcome(failures: list[Failure], code: int, failed: int | None) -> tuple[str | None, int]:
    """What the launcher says at the end, None for processes that were told to end, and its exit code.

    Args:
        failures: What was noted, from [`noted`].
        code: Exit code of the process that the launcher took for the first one to fail, below 0 for a signal.
        failed: Its rank; None where there is one process.
    """
    # The signals of whoever ended the processes; torch's watchdog aborts those that wait for one that has failed.
    told = (-signal.SIGINT, -signal.SIGTERM)
    waited = code == -signal.SIGABRT and failures
    own = [failure for failure in failures if failure.rank == (failed or 0)]
    if code < 0 and code not in told and not own and not waited:  # what others noted came of it
        cause = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
        return f"the process{_of(failed)} was ended by {signal.Signals(-code).name}{cause}", code
    if failures:  # the launcher may have ended their processes before they did so themselves
        first = failures[0]
        whole = failed is None or (first.refused and first.rank == 0)
        message = first.message if whole else f"the process{_of(first.rank)}: {first.message}"
        return message, 2 if first.refused else 1
    if code in told:
        return None, code
    return f"the process{_of(failed)} ended with exit code {code}; what it said stands above", code


def say_error(prog: str, message: str) -> None:
    """Writes a command's one line of what went wrong, in red where that can be seen."""
    line = f"{prog}: error: {message}"
    Console(stderr=True, soft_wrap=True).print(line, style="red", highlight=False, markup=False)


def _of(number: int | None) -> str:
    return "" if number is None else f" of rank {number}"
