"""Ctrl-C and signals that end a command: one line that says how to go on, and the exit code that a shell gives it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

EXIT_CODE = 128 + signal.SIGINT
OTPO_LAUNCHER = "OTPO_LAUNCHER"
"""Set in the environment of processes that `otpo` itself launched: it speaks for them."""


def interruptible(prog: str, body: Callable[[], int], advice: Callable[[], str] | None = None) -> int:
    """Runs a command and returns its exit code; 130 after Ctrl-C, with one line in place of a trace.

    Args:
        prog: How the command is called.
        body: The command.
        advice: What the line says after "stopped by you", such as how to resume.
    """
    _replace_handler(_leave_at_once, signal.default_int_handler)
    try:
        return body()
    except KeyboardInterrupt:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the line
        _say(prog, "" if advice is None else f"; {advice()}")
        if "LOCAL_RANK" in os.environ or OTPO_LAUNCHER in os.environ:
            leave(EXIT_CODE)
        signal.signal(signal.SIGINT, before)
    return EXIT_CODE


@contextmanager
def ended_by_signal(prog: str) -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a block tidily, as an exception: what is unfinished is removed on the way out.

    The exit code is what a shell gives them, 128 and their number. Handlers that others set stay.

    Args:
        prog: How the command is called.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.stderr.write(f"{prog}: ended by {signal.Signals(number).name}; the next run starts anew\n")
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # which handlers belong to
        taken = []
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def leave_while_importing() -> None:
    """Has Ctrl-C end the process at once until [`interruptible`] runs: modules take seconds to import.

    An exception would not do, since some modules catch it while they are imported, and break.
    """
    _replace_handler(signal.default_int_handler, _leave_at_once)


@contextmanager
def importing() -> Iterator[None]:
    """[`leave_while_importing`] for a block."""
    leave_while_importing()
    yield
    _replace_handler(_leave_at_once, signal.default_int_handler)


def _replace_handler(old: Callable[..., object], new: Callable[..., object]) -> None:
    """Sets the handler of Ctrl-C, unless it is another one's than `old`; handlers belong to the main thread."""
    if signal.getsignal(signal.SIGINT) is old:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, new)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    _say("otpo", "")
    leave(EXIT_CODE)


def _say(prog: str, rest: str) -> None:
    if OTPO_LAUNCHER not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{prog}: stopped by you{rest}\n")


def leave(code: int) -> NoReturn:
    """Ends the process at once: others may never come to the collective that a tidy end would wait in."""
    with suppress(RuntimeError):  # of a buffer that the signal found in use
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
