"""A launched process that fails as its argument says; it imports no torch, so that a test takes a second."""

import os
import signal
import sys
import time

from otpo.cli.launching.failures import FOLDER, came_later, note, noted, rank


def main(kind: str) -> int:
    first = rank() == 1
    if not first and kind == "refusal":
        time.sleep(600)  # until the launcher ends it
    if not first and kind == "fault":
        while not noted(os.environ[FOLDER]):  # a busy machine may start the other process seconds later
            time.sleep(0.01)
    if kind == "refusal":
        note("`option=3` can't be used. Set 4.", ValueError(), refused=True)
        return 2
    if kind == "fault":
        failure = note(f"RuntimeError: of {rank()}", RuntimeError(), refused=False)
        assert failure is not None and came_later(failure) is not first
        time.sleep(0.0 if not first else 1.0)  # what failed first may end last
        return 1
    if kind == "killed":
        if first:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
