"""The ledger of a run: a JSON line for each prompt, appended as it is done, from which a run that was killed goes on.

The first line tells the run's options and data. A line that was half written when the run was killed is cut off.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

_HEAD = "run"
_BEGIN = json.dumps({_HEAD: {}})[:-2].encode()
"""What every ledger begins with."""
_KEYS = {"row", "outcome", "reason", "answers"}
"""What every entry has; one of a pair has the pair too."""


def ledger_path(output: str | Path) -> Path:
    """Where the ledger of the pairs that are written to `output` is: beside them."""
    return Path(f"{output}.ledger")


@contextmanager
def open_ledger(
    path: Path, identity: Mapping[str, Any], forget_failed: bool = False, contents: Mapping[str, str] | None = None
) -> Iterator["Ledger"]:
    """The ledger of a run, begun, or taken up where an earlier run of the same options stopped.

    Args:
        path: Its file; the folder is made.
        identity: What makes the run what it is, as JSON values.
        forget_failed: Whether entries of prompts that failed are as if they were not there; a later entry of a row
            stands in the place of an earlier one.
        contents: Entries of `identity` that are digests, by name, and what each is of. A ledger that lacks one was
            written before that was noted, so nobody knows whether its entries are of the same.

    Raises:
        ValueError: The file is the ledger of a run with other options, each of which the message names with both
            values, lacks one of `contents`, or can't be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path, identity, contents or {}) if path.exists() else {}
    if forget_failed:
        known = {row: entry for row, entry in known.items() if entry["outcome"] != "failed"}
    with path.open("a", encoding="utf-8") as file:
        ledger = Ledger(file, known)
        if not path.stat().st_size:
            ledger.write([{_HEAD: dict(identity)}])
        yield ledger


class Ledger:
    """The lines of an open ledger.

    Attributes:
        entries: What is written of each prompt, by its row in the dataset.
        counts: How many of them have which outcome.
    """

    def __init__(self, file: Any, entries: dict[int, dict[str, Any]]) -> None:
        self._file, self.entries = file, entries
        self.counts = Counter(entry["outcome"] for entry in entries.values())

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Appends entries, each with its `row`, those that are there left out; what is killed later keeps them."""
        new = [entry for entry in entries if entry["row"] not in self.entries]
        self.write(new)
        self.entries.update((entry["row"], entry) for entry in new)
        self.counts.update(entry["outcome"] for entry in new)

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Appends lines and hands them to the operating system."""
        self._file.write("".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
        self._file.flush()


def has_entries(path: Path) -> bool:
    """Whether a file has a whole line behind the first one, as a ledger has for a prompt."""
    with path.open("rb") as file:
        return [line[-1:] for line in islice(file, 2)] == [b"\n", b"\n"]


def read_entries(path: Path) -> dict[int, dict[str, Any]]:
    """What a ledger has of each prompt, by its row in the dataset.

    Raises:
        ValueError: A line of it is damaged, other than a last one that is not whole.
    """
    return _parse(path, _whole_lines(path.read_bytes()))[1]


def _read(path: Path, identity: Mapping[str, Any], contents: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """The entries of a ledger, whose half-written end is cut off."""
    content = path.read_bytes()
    if not content.startswith(_BEGIN[: len(content)]):  # the beginning of a half-written one may be all there is
        raise ValueError(f"`output`: {path} is no ledger of `otpo pairs`. Move it away, or name another `output`.")
    whole = _whole_lines(content)
    head, entries = _parse(path, whole)
    if entries:
        _require_same(path, head, identity, contents)
    # Without an entry nothing is lost, so a run that was refused does not keep another one from beginning.
    if not entries or len(whole) < len(content):
        os.truncate(path, len(whole) if entries else 0)
    return entries


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _parse(path: Path, whole: bytes) -> tuple[Any, dict[int, dict[str, Any]]]:
    """What the first line tells, and the entries."""
    entries: dict[int, dict[str, Any]] = {}
    head: Any = None
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            if number == 1:
                head = entry[_HEAD]
            elif not _KEYS.issubset(entry) or not isinstance(entry["row"], int):
                raise KeyError(sorted(_KEYS))
            else:
                entries[entry["row"]] = entry  # the last one stands, where a failed prompt was answered again
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`output`: {path} is no ledger of `otpo pairs`, or is damaged in line {number}. Remove it to start "
                "anew, or name another `output`."
            ) from error
    return head, entries


def _require_same(
    path: Path, found: Mapping[str, Any], identity: Mapping[str, Any], contents: Mapping[str, str]
) -> None:
    lacking = [f"`{name}` ({what})" for name, what in contents.items() if name not in found]
    if lacking:
        raise ValueError(
            f"`output`: {path} is the ledger of an older otpo, which did not note {'; '.join(lacking)}. So nobody "
            "can tell whether its pairs are of what is there now. Name another `output`, or remove the ledger to "
            "start anew."
        )
    other = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
    if other:
        told = "; ".join(
            f"`{name}` was {_shown(found.get(name))} and is {_shown(identity.get(name))}"
            + (f" ({contents[name]})" if name in contents else "")
            for name in other
        )
        raise ValueError(
            f"`output`: {path} is the ledger of another run: {told}. Set what it was, name another `output`, or "
            "remove the ledger to start anew."
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
