"""Whether a path can be written to, found out before there is something to write."""

import os
import tempfile
from pathlib import Path


def require_writable_file(option: str, path: str, example: str) -> None:
    """Raises a `ValueError` that names the option unless a file can be written there; folders are made later.

    Args:
        option: That names the path.
        path: Its value.
        example: Name of a file, for the message where the path is a folder.
    """
    file = Path(path)
    if file.is_dir() or path.endswith(("/", os.sep)):
        raise ValueError(f"`{option}={path}` is a folder. Name a file, such as {file / example}.")
    if file.exists():
        if not os.access(file, os.W_OK):
            raise ValueError(f"`{option}={path}` can't be written: permission denied. Name another file.")
        return
    _require_writable_folder(option, path, file.parent)


def require_writable_folder(option: str, path: str) -> None:
    """Raises a `ValueError` that names the option unless files can be written in that folder, which is made later."""
    _require_writable_folder(option, path, Path(path))


def _require_writable_folder(option: str, path: str, folder: Path) -> None:
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"`{option}={path}`: {there} is a file, not a folder. Name another place.")
        with tempfile.TemporaryFile(dir=there):  # permissions alone don't tell: file systems are read-only or full
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"`{option}={path}` can't be written: {reason}. Name another place.") from error
