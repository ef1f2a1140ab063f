"""Reading local data files: which kinds there are, and what is wrong with one that can't be read."""

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from datasets import Features, Value
from datasets.exceptions import DatasetsError
from datasets.utils import logging

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BUILDERS |= {f"{ending}.gz": kind for ending, kind in BUILDERS.items() if kind != "parquet"}
"""Endings of files that are read, and what `datasets` reads them with."""
# A reader meets these on broken files; `datasets` wraps some, and a file without rows ends its generator early.
_FAULTS = (OSError, ValueError, TypeError, KeyError, EOFError, StopIteration, DatasetsError)


def builder_options(name: str) -> dict[str, Any] | None:
    """The arguments of `datasets.load_dataset` for a file of that name; None if its kind is not read.

    All columns of a CSV file are text: an answer of "42" is no number, and one of "None" is not missing.
    """
    ending = next((ending for ending in BUILDERS if name.lower().endswith(ending)), None)
    if ending is None:
        return None
    if BUILDERS[ending] != "csv" or not Path(name).is_file():
        return {"path": BUILDERS[ending]}
    with reading("dataset_name", name), _opened(Path(name), "rt") as file:
        header = next(csv.reader(file))
    columns = Features({column: Value("string") for column in header})
    return {"path": "csv", "features": columns, "keep_default_na": False}


@contextmanager
def reading(option: str, name: str, files: Sequence[str] = ()) -> Iterator[None]:
    """Turns what goes wrong in the block into a `ValueError` that names the option, the file and where it is broken.

    Args:
        option: That names the data.
        name: Its value: a file, a folder or a name on the Hub.
        files: Files that are read, where the value is not one itself.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is told here, `datasets` logs too
    try:
        yield
    except _FAULTS as error:
        cause: BaseException = error
        while isinstance(cause, DatasetsError) and cause.__cause__ is not None:
            cause = cause.__cause__
        for file in files or [name]:
            reason = _broken_place(Path(file)) if Path(file).is_file() else None
            if reason is not None or (file == name and Path(name).is_file()):
                raise ValueError(f"`{option}`: the file {file} can't be read: {reason or _told(cause)}.") from error
        raise ValueError(f"`{option}={name}` can't be read: {_told(cause)}.") from error
    finally:
        logging.set_verbosity(verbosity)


def _told(error: BaseException) -> str:
    if isinstance(error, StopIteration) or type(error).__name__ == "EmptyDataError":
        return "it has no rows"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[Any]]:
    options: Any = {} if "b" in mode else {"encoding": "utf-8-sig", "newline": ""}
    opens: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opens(path, mode, **options) as file:
        yield file


def _broken_place(path: Path) -> str | None:
    """The line of a text file that is no UTF-8 or, for JSON, can't be parsed; None if there is no such line."""
    kind = next((kind for ending, kind in BUILDERS.items() if path.name.lower().endswith(ending)), None)
    if kind not in ("json", "csv"):
        return None
    try:
        with _opened(path, "rb") as file:
            if kind == "json" and file.read(1).strip() == b"[":
                file.seek(0)
                return _broken_list(file.read())
            file.seek(0)
            return next(filter(None, (_broken_line(n, line, kind) for n, line in enumerate(file, start=1))), None)
    except (OSError, EOFError) as error:
        return _told(error)


def _broken_line(number: int, line: bytes, kind: str) -> str | None:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        content = json.loads(text) if kind == "json" and text else {}
    except UnicodeDecodeError as error:
        return f"line {number} is no UTF-8 text: {error.reason} at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"line {number} is no JSON: {error.msg} in column {error.colno}"
    return None if isinstance(content, dict) else f"line {number} is no JSON mapping but {text:.60}"


def _broken_list(content: bytes) -> str | None:
    try:
        rows = json.loads(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"line {line} is no UTF-8 text: {error.reason}"
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is no JSON: {error.msg} in column {error.colno}"
    place, row = next(((place, row) for place, row in enumerate(rows) if not isinstance(row, dict)), (0, None))
    return None if row is None else f"row {place} is no JSON mapping but {json.dumps(row):.60}"
