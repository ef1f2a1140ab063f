"""Ctrl-C: one line that says how to go on, and the exit code that a shell gives it."""

import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType

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
    try:
        return body()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the line
        try:
            _say(prog, "" if advice is None else f"; {advice()}")
        finally:
            if "LOCAL_RANK" in os.environ:
                _leave()
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return EXIT_CODE


def quiet_imports() -> None:
    """Has Ctrl-C leave without a trace while the program's modules are imported, which takes seconds."""
    standard = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return standard(kind, error, trace)
        _say("otpo", "")
        _leave()

    sys.excepthook = hook


def _say(prog: str, rest: str) -> None:
    if OTPO_LAUNCHER not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{prog}: stopped by you{rest}\n")


def _leave() -> None:
    """Ends the process at once: others may never come to the collective that a tidy end would wait in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
