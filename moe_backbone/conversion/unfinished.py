"""Folders for what is not finished yet, beside what it becomes: gone when their run ends, however it ends.

A run that is killed can't remove its folder. So each folder holds a file that its run keeps locked, and the system
unlocks it with the process. The next run to the same name removes those that nobody holds.

A lock tells nothing where the file system keeps locks within each host, as some shared ones do. The file names the
host, and folders of other hosts stay, as do those without such a file.
"""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where folders of killed runs stay
    fcntl = None

_OWNER = ".owner"
_RANDOM = re.compile(r"[a-z0-9_]{8}")  # what `tempfile` appends


@contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, where those that killed runs left are removed first.

    Args:
        out: A path in a folder that is there.
    """
    remove_left_over(out)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # The name comes after the lock: whoever reads it and gets the lock knows that the run is gone.
        if _locks(owner):
            os.write(owner, _host())
        yield folder
    finally:
        _remove(folder, owner)


def remove_left_over(out: Path) -> list[Path]:
    """Removes the folders of runs to `out` that live no more.

    Args:
        out: The path that they were to write.

    Returns:
        What was removed.
    """
    prefix, removed = f".{out.name}-", []
    for folder in sorted(out.parent.iterdir()):
        if not folder.name.startswith(prefix) or not _RANDOM.fullmatch(folder.name.removeprefix(prefix)):
            continue
        try:
            owner = os.open(folder / _OWNER, os.O_RDWR)
        except OSError:  # it is another one's, or not ours at all
            continue
        if os.read(owner, 256) == _host() and _locks(owner):
            _remove(folder, owner)
            removed.append(folder)
        else:
            os.close(owner)
    return removed


def _remove(folder: Path, owner: int) -> None:
    """Removes a folder whose lock we hold, and lets the lock go; what can't be removed is left to the next run."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _OWNER:  # which goes last, and closed, since NFS keeps open files
            with suppress(OSError):
                path.unlink()
    os.close(owner)
    shutil.rmtree(folder, ignore_errors=True)


def _host() -> bytes:
    return socket.gethostname().encode()


def _locks(owner: int) -> bool:
    """Takes the lock of an open file, unless another one holds it or there are no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return fcntl is not None
