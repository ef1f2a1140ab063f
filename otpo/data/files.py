"""Reading local data files, and telling what is wrong with one that can't be read."""

import csv
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import fsspec
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import logging

from .source_kinds import KINDS, WHOLE, file_kind

# A reader meets these on broken files; `datasets` wraps some, and a file without rows ends its generator early.
_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)
_FAULTS = (*_BROKEN, ValueError, TypeError, KeyError, StopIteration, DatasetsError)


class SourceError(ValueError):
    """A source of data can't be read.

    Attributes:
        problem: What is wrong with it, as the end of "it can't be read: ".
    """

    def __init__(self, problem: str, sentence: str | None = None) -> None:
        """Takes the problem, and a whole sentence about it in which `{option}` stands for the option's name."""
        super().__init__(problem)
        self.problem = problem
        self._sentence = sentence

    def told(self, option: str, name: str) -> str:
        """The message for a user who named the source by an option."""
        if self._sentence is None:
            return f"`{option}={name}` can't be read: {self.problem}."
        return self._sentence.replace("{option}", option, 1)


def read_file(name: str, streaming: bool, validate: bool = False) -> Dataset | IterableDataset:
    """The rows of a local file, whose first one is read here also where it is streamed.

    All columns of a CSV file are text: an answer of "42" is no number, and one of "None" is not missing. A .txt file
    has the column `text`, a row for each line.

    Args:
        name: The file.
        streaming: Whether its rows are read as they are needed.
        validate: Whether all rows that are not streamed are looked at for text that is no UTF-8, which takes a read
            of the whole table.

    Raises:
        SourceError: There is no such file, it is of no kind that is read, or it is broken.
    """
    kind = file_kind(name)
    if kind is None:
        raise SourceError(
            f"it is of no kind that is read here: {KINDS}",
            f"`{{option}}`: the file {name} is of no kind that is read here. Name a {KINDS} file.",
        )
    if not Path(name).is_file():
        raise SourceError(
            "there is no such file", f"`{{option}}`: the file {name} does not exist. Name one that does: {KINDS}."
        )
    builder, compression = kind
    if compression == "zstd" and find_spec("zstandard") is None:
        raise SourceError("it is compressed by zstd, which needs another package: `pip install zstandard`")
    with reading(name):
        columns: dict[str, Any] = {}
        if builder == "csv":
            with _opened(name, "rt") as file:
                header = next(csv.reader(file))
            columns = {"features": Features({column: Value("string") for column in header}), "keep_default_na": False}
        rows: Any = load_dataset(builder, data_files={WHOLE: name}, split=WHOLE, streaming=streaming, **columns)
        next(iter(rows))  # a stream's file is opened here; one without rows ends
        if validate and isinstance(rows, Dataset):
            rows.data.validate(full=True)
    return rows


@contextmanager
def reading(name: str, files: Sequence[str] = ()) -> Iterator[None]:
    """Turns what goes wrong in the block into a [`SourceError`] that names the file and where it is broken.

    Args:
        name: A file, a folder or a name on the Hub.
        files: Files that are read, where the name is not one itself.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is told here, `datasets` logs too
    try:
        yield
    except SourceError:
        raise
    except _FAULTS as error:
        for file in files or [name]:
            reason = _broken_place(file) if Path(file).is_file() else None
            if reason is not None or (file == name and Path(name).is_file()):
                reason = reason or fault(error)
                sentence = f"`{{option}}`: the file {file} can't be read: {reason}."
                raise SourceError(reason if file == name else f"the file {file}: {reason}", sentence) from error
        raise SourceError(fault(error)) from error
    finally:
        logging.set_verbosity(verbosity)


def fault(error: BaseException) -> str:
    """What went wrong, in one line, from the error under those that `datasets` wraps around it."""
    while isinstance(error, DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration) or type(error).__name__ == "EmptyDataError":
        return "it has no rows"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")


@contextmanager
def _opened(name: str, mode: str) -> Iterator[IO[Any]]:
    kind = file_kind(name)
    options: Any = {} if "b" in mode else {"encoding": "utf-8-sig", "newline": ""}
    with fsspec.open(name, mode, compression=kind and kind[1], **options) as file:
        yield file  # pyright: ignore[reportReturnType]


def _broken_place(name: str) -> str | None:
    """The line of a text file that is no UTF-8 or, for JSON, can't be parsed; None if there is no such line."""
    kind = file_kind(name)
    if kind is None or kind[0] == "parquet":
        return None
    try:
        with _opened(name, "rb") as file:
            if kind[0] == "json" and file.read(1).strip() == b"[":
                file.seek(0)
                return _broken_list(file.read())
            file.seek(0)
            return next(filter(None, (_broken_line(n, line, kind[0]) for n, line in enumerate(file, start=1))), None)
    except _BROKEN as error:
        return fault(error)


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
