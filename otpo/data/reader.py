"""The one reader of data: names on the Hub, saved folders, local files, and the sets that come with otpo.

`otpo align`, `sft` and `explain` read by it through [`otpo.data.loading`], and so do TRL's mixtures (`datasets` in a
recipe). `otpo pretrain` hands it to `moe_backbone.pretraining.documents.load_mixture`, since neither library may
import the other; `moe_backbone` alone reads by a plain reader of its own. An option that a source can't honour is
refused here: a configuration of a file, a split that is not there, a part of a stream.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from .demo import CORPUS_SPLITS, SPLITS, load_demo_corpus, load_demo_instructions, load_demo_preferences
from .files import SourceError, fault, read_file, reading
from .source_kinds import BUNDLED, DEMO, DEMO_INSTRUCTIONS, WHOLE, names_file

Rows = Dataset | IterableDataset
Splits = Mapping[Any, Any]
"""Rows by the name of their split."""
_ALL = "all"
_CORPUS_ROWS = {"train": 20_000, "test": 500}


class SplitError(SourceError):
    """A source has no such split.

    Attributes:
        found: Those that it has.
    """

    def __init__(self, splits: Splits) -> None:
        self.found = sorted(map(str, splits))
        several = len(self.found) > 1
        super().__init__(
            f"it has the split(s) {self.found}" if several else f"it has no such split. Should be one of {self.found}"
        )


def read_splits(
    name: str,
    *,
    config: str | int | None = None,
    streaming: bool = False,
    config_option: str = "dataset_config",
    validate: bool = False,
) -> Splits:
    """The splits of a source.

    Args:
        name: A name on the Hub, a folder written by `save_to_disk` or of data files, a file, or one of [`BUNDLED`].
        config: Configuration on the Hub; of a bundled set the number of rows of each split that is taken. None for
            the default.
        streaming: Whether the rows are read, or the documents of `otpo/demo-corpus` written, as they are needed. Of
            saved folders and the other bundled sets, whose rows are there at once, this makes streams.
        config_option: What the user calls `config`.
        validate: Whether all text of a file that is not streamed is looked at; see [`read_file`].

    Raises:
        SourceError: The source can't be read, or `config` means nothing to it.
    """
    path = Path(name)
    if name in BUNDLED:
        return _read_bundled(name, config, streaming, config_option)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _refuse_config(config, config_option, "a saved dataset")
        with reading(name):
            saved = load_from_disk(name)
        splits = saved if isinstance(saved, DatasetDict) else {WHOLE: saved}
        return {split: _streamed(rows) for split, rows in splits.items()} if streaming else splits
    if path.is_file() or (names_file(name) and not path.is_dir()):
        _refuse_config(config, config_option, "a file")
        return {WHOLE: read_file(name, streaming, validate)}
    try:
        return load_dataset(name, None if config is None else str(config), streaming=streaming)  # pyright: ignore
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, OSError) and not path.is_dir():
            problem = f"no local file or folder and was not found on the Hub: {error}"
            raise SourceError(f"it is {problem}", f"`{{option}}={name!r}` is {problem}") from error
        raise SourceError(fault(error)) from error


def select_split(splits: Splits, split: str) -> Rows:
    """The rows of a split, or of parts of splits as `datasets` writes them: `train[:10%]`, `train[:100]+test`, `all`.

    Raises:
        SplitError: There is no such split.
        SourceError: A part of a stream is asked for.
    """
    if split in splits:
        return splits[split]
    if not has_split(splits, split):
        raise SplitError(splits)
    parts = [(name, "") for name in splits] if split == _ALL else _parts(split)
    tables = {name: splits[name] for name, _ in parts}
    if not all(isinstance(table, Dataset) for table in tables.values()):
        raise SourceError(f"a stream has no parts such as {split!r}. Name a whole split, or read without streaming")
    try:
        taken = [_slice(tables[name], place) for name, place in parts]
    except (ValueError, AssertionError) as error:
        raise SourceError(f"{split!r} is no part of a split: {fault(error)}") from error
    return taken[0] if len(taken) == 1 else concatenate_datasets(taken)


def has_split(splits: Splits, split: str) -> bool:
    """Whether there is that split, or the one that a part is of.

    `all` is a word of `datasets`; it is refused for bundled sets, whose test splits must not be trained on.
    """
    if split == _ALL:
        return not isinstance(splits, _Bundled)
    return split in splits or (("[" in split or "+" in split) and all(name in splits for name, _ in _parts(split)))


def _parts(split: str) -> list[tuple[str, str]]:
    """The splits that a sum of parts names, each with its place, such as `[:10%]`; that of a whole split is empty."""
    named = [part.partition("[") for part in split.split("+")]
    return [(name.strip(), (bracket + place).strip()) for name, bracket, place in named]


def _slice(table: Dataset, place: str) -> Dataset:
    # `datasets` knows no splits with a hyphen in their names, so the place is handed to it with another name.
    if not place:
        return table
    (part,) = ReadInstruction.from_spec(f"split{place}").to_absolute({"split": len(table)})
    return table.select(range(part.from_, part.to))


class _Bundled(Mapping[str, Rows]):
    """The splits of a set that comes with otpo, each made when it is taken."""

    def __init__(self, name: str, count: int | None, streaming: bool) -> None:
        self.name, self.count, self.streaming = name, count, streaming

    def __getitem__(self, split: str) -> Rows:
        if split not in list(self):
            raise KeyError(split)
        try:
            if self.name == DEMO:
                rows = load_demo_preferences(split, count=self.count)
            elif self.name == DEMO_INSTRUCTIONS:
                rows = self._instructions(split)
            else:
                rows = load_demo_corpus(split, self.count or _CORPUS_ROWS[split], streaming=self.streaming)
        except ValueError as error:
            raise SourceError(str(error).rstrip(".")) from error
        return _streamed(rows) if self.streaming else rows

    def _instructions(self, split: str) -> Dataset:
        if split == WHOLE or self.count is None:
            return load_demo_instructions(split, count=self.count)
        rows = load_demo_instructions(split)  # those of the test splits are never generated
        if self.count > len(rows):
            raise SourceError(f"its split {split!r} has {len(rows)} rows, fewer than {self.count}. Ask for fewer")
        return rows.select(range(self.count))

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS if self.name in (DEMO, DEMO_INSTRUCTIONS) else CORPUS_SPLITS)

    def __len__(self) -> int:
        return len(list(iter(self)))


def _read_bundled(name: str, config: str | int | None, streaming: bool, config_option: str) -> Splits:
    if Path(name).exists():
        problem = "both the set that comes with otpo and something in this folder"
        remedy = f"Write `./{name}` for yours, or rename it"
        raise SourceError(f"it is {problem}. {remedy}", f"`{{option}}={name}` is {problem}. {remedy}.")
    if config is not None and not (str(config).isdecimal() and int(config)):
        problem = f"of `{name}` it is the number of {BUNDLED[name]} to generate, at least 1, such as 20000"
        raise SourceError(
            f"`{config_option}` is {config!r}, but {problem}", f"`{config_option}={config!r}`: {problem}."
        )
    return _Bundled(name, None if config is None else int(config), streaming)


def _refuse_config(config: str | int | None, option: str, kind: str) -> None:
    if config is not None:
        raise SourceError(f"{kind} has no configurations, and `{option}` is {config!r}. Leave it out")


def _streamed(rows: Rows) -> Rows:
    return rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
