"""The data options of the commands, and the rows that they name: read, looked at, shuffled and cut by one rule.

A number of rows is always the first of a shuffle by the run's seed, and so is a test split that is cut. What a source
is and how it is read is in [`otpo.data.reader`].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments

from .files import SourceError, reading
from .reader import Rows, SplitError, Splits, has_split, read_splits, select_split
from .row_checks import check_pairs
from .row_numbers import numbers_of, remember_numbers
from .source_kinds import BUNDLED, HELP, KINDS, WHOLE

Check = Callable[[Rows, str, Sequence[int] | None], Rows]
"""Looks at each row of a dataset that is called so, whose rows have these numbers; hands the dataset on."""
Limits = tuple[int | None, int | None]
"""How many rows to train on and to evaluate on; None for all."""
_STREAM_SHUFFLE_BUFFER = 10_000
_OF_A_NAME = {
    "dataset_config": "`name` of its sources",
    "dataset_train_split": "`split` of its sources",
    "dataset_test_split": "`test_split_size`",
    "dataset_streaming": "`streaming`",
}
"""Options that go with `dataset_name`, and what a mixture has in their place."""


@dataclass
class RowArguments(ScriptArguments):
    """Where the data comes from and how much of it is used: the same options in every command.

    Parameters:
        dataset_name: Name on the Hub, folder written by `save_to_disk`, local file, `"otpo/demo"`,
            `"otpo/demo-instructions"` or `"otpo/demo-corpus"`.
        dataset_config: Configuration on the Hub; of a bundled set the number of rows of the split to train on.
        dataset_train_split: Split to train on, or a part of one.
        dataset_test_split: Split to evaluate on, or a part of one. A bundled set's is read whole, also of a stream.
        dataset_streaming: Whether rows are read as they are needed.
        max_train_rows: Rows to train on, the first of a shuffle with `seed`, >= 1. None: all.
        max_eval_rows: The same for evaluation.
    """

    dataset_name: str | None = field(default=None, metadata={"help": HELP["dataset_name"]})
    dataset_config: str | None = field(default=None, metadata={"help": HELP["dataset_config"]})
    dataset_train_split: str = field(default=WHOLE, metadata={"help": HELP["dataset_train_split"]})
    dataset_test_split: str = field(default="test", metadata={"help": HELP["dataset_test_split"]})
    dataset_streaming: bool = field(default=False, metadata={"help": HELP["dataset_streaming"]})
    max_train_rows: int | None = field(default=None, metadata={"help": HELP["max_train_rows"]})
    max_eval_rows: int | None = field(default=None, metadata={"help": HELP["max_eval_rows"]})

    def __post_init__(self) -> None:
        for name in (entry.name for entry in fields(self) if entry.name.startswith(("max_train_", "max_eval_"))):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for all of them.")

    @property
    def limits(self) -> Limits:
        """How many rows to train on and to evaluate on."""
        return self.max_train_rows, self.max_eval_rows


@dataclass
class DataArguments(RowArguments):
    """[`RowArguments`] of preference pairs, with the older names of two of them.

    Parameters:
        max_train_pairs: The older name of `max_train_rows`.
        max_eval_pairs: The older name of `max_eval_rows`.
    """

    max_train_pairs: int | None = field(default=None, metadata={"help": "The older name of `max_train_rows`."})
    max_eval_pairs: int | None = field(default=None, metadata={"help": "The older name of `max_eval_rows`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for use in ("train", "eval"):
            rows, pairs = getattr(self, f"max_{use}_rows"), getattr(self, f"max_{use}_pairs")
            if rows is not None and pairs is not None:
                raise ValueError(
                    f"Both `max_{use}_rows={rows}` and `max_{use}_pairs={pairs}`, its older name, are set. Remove "
                    "the latter."
                )

    @property
    def limits(self) -> Limits:
        """How many pairs to train on and to evaluate on."""
        return self.max_train_rows or self.max_train_pairs, self.max_eval_rows or self.max_eval_pairs


def load_pairs(
    data: RowArguments, mixture: DatasetMixtureConfig, *, seed: int, evaluate: bool, check: Check = check_pairs
) -> tuple[Rows, Rows | None]:
    """[`load_rows`] of preference pairs, each of which is looked at."""
    return load_rows(data, mixture, seed=seed, evaluate=evaluate, check=check)


def unchecked(rows: Rows, name: str, numbers: Sequence[int] | None) -> Rows:
    """The [`Check`] that looks at nothing."""
    return rows


def load_rows(
    data: RowArguments,
    mixture: DatasetMixtureConfig,
    limits: Limits | None = None,
    *,
    seed: int,
    evaluate: bool,
    check: Check = unchecked,
) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those for evaluation when `evaluate` is set.

    Args:
        data: Name, splits and numbers of rows.
        mixture: TRL's mixture of datasets, in place of a name. Its `test_split_size` also cuts a test split from a
            named dataset that has none.
        limits: Numbers of rows in place of those of `data`.
        seed: Seed of the shuffle and of the cut.
        evaluate: Whether a test split is needed.
        check: Looks at the rows that are used.

    Raises:
        ValueError: No dataset is named or it can't be read, a split is missing, two sources are named, an option
            means nothing to the source, or `check` refuses a row.
    """
    limits = data.limits if limits is None else limits
    size = mixture.test_split_size
    if size is not None and size >= 1:
        size = int(size)  # `datasets` takes 4 but not 4.0
    # A bundled set's `dataset_config` is the number of its rows to train on, so the test split is read without it.
    splits = _read(data, mixture)
    held_out = _read_named(data.dataset_name, None, False) if data.dataset_name in BUNDLED else splits
    train = _select(splits, data, "dataset_train_split")
    # The cut comes after the check, whose messages number the rows as the user does. A mixture is cut as TRL cuts it,
    # also where nothing is evaluated.
    cut = not has_split(held_out, data.dataset_test_split) and size is not None and (evaluate or mixture.datasets)
    test = None
    if cut:
        if not isinstance(train, Dataset):
            raise ValueError(
                f"`test_split_size={size}` can't cut a stream. Read without streaming, or name a split of the dataset "
                "with `dataset_test_split`."
            )
        train, test = _cut(check(train, "training", None), size, seed)
        test, check = test if evaluate else None, unchecked
    elif evaluate:
        test = _select(held_out, data, "dataset_test_split")
    train = first_rows(train, limits[0], seed, "training", check)
    return train, None if test is None else first_rows(test, limits[1], seed, "evaluation", check)


def _cut(rows: Any, size: Any, seed: int) -> tuple[Dataset, Dataset]:
    """The training and the test part of a dataset, each with its rows' numbers."""
    numbered = Dataset.from_dict({"number": range(len(rows))})  # cut likewise, since the cut does not tell them
    parts, numbers = (each.train_test_split(test_size=size, seed=seed) for each in (rows, numbered))
    train, test = (remember_numbers(parts[name], numbers[name]["number"]) for name in ("train", "test"))
    return train, test  # pyright: ignore[reportReturnType]


def first_rows(rows: Rows, count: int | None, seed: int, name: str, check: Check = unchecked) -> Rows:
    """The first rows of a shuffle, of a stream of one within its next 10,000, each looked at; None for all rows."""
    if count is None:
        return check(rows, name, None)
    if isinstance(rows, Dataset):
        # The order of `Dataset.shuffle`, which does not tell the rows' numbers.
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        known = numbers_of(rows)  # of the part of a cut
        numbers = (chosen if known is None else known[chosen]).tolist()
        return remember_numbers(check(rows.select(chosen.tolist()), name, numbers), numbers)
    return check(rows, name, None).shuffle(seed=seed, buffer_size=_STREAM_SHUFFLE_BUFFER).take(count)  # pyright: ignore


def _read(data: RowArguments, mixture: DatasetMixtureConfig) -> Splits:
    """The splits of what is named, be it a dataset or a mixture."""
    name = data.dataset_name
    if not mixture.datasets:
        if not name:
            raise ValueError(
                "No dataset is named. Set `dataset_name` to a name on the Hub, a folder written by `save_to_disk`, a "
                f"local file ({KINDS}) or one of {', '.join(map(repr, BUNDLED))}, or list a mixture under `datasets` "
                "in the recipe."
            )
        if mixture.streaming:
            raise ValueError("`streaming` goes with a mixture under `datasets`. Set `dataset_streaming` of a name.")
        return _read_named(name, data.dataset_config, data.dataset_streaming)
    if name:
        raise ValueError(f"Both `dataset_name={name!r}` and `datasets` name the data. Remove one of them.")
    usual = RowArguments()
    for option, instead in _OF_A_NAME.items():
        value = getattr(data, option)
        if value != getattr(usual, option):
            raise ValueError(f"`{option}={value}` goes with `dataset_name`. Of a mixture set {instead}.")
    return {WHOLE: _mix(mixture)}


def _read_named(name: str | None, config: str | None, streaming: bool) -> Splits:
    with _naming("dataset_name", str(name)):
        return read_splits(str(name), config=config, streaming=streaming, validate=True)


def _mix(mixture: DatasetMixtureConfig) -> Rows:
    """The rows of TRL's mixture: all, or the first of each source by its `fraction`, as `trl.get_dataset` does.

    Here a source may be anything that `dataset_name` may be.
    """
    rows = [_read_part(source, mixture.streaming) for source in mixture.datasets]
    shares = [source.fraction for source in mixture.datasets]
    if shares != [None] * len(shares):
        if None in shares:
            raise ValueError("`fraction` is set of some of the `datasets`. Set it of all of them, or of none.")
        if mixture.streaming:
            raise ValueError("`fraction` can't be taken of streams. Leave it out, or set `streaming` to false.")
        weights = [share / sum(shares) for share in shares]  # pyright: ignore
        total = min(len(part) / weight for part, weight in zip(rows, weights, strict=True) if weight > 0)  # pyright: ignore
        rows = [part.select(range(round(w * total))) for part, w in zip(rows, weights, strict=True)]  # pyright: ignore
    return concatenate_datasets(rows)  # pyright: ignore


def _read_part(source: Any, streaming: bool) -> Rows:
    """The rows of a source of TRL's mixture. One with `data_files` or `data_dir` is for `datasets` alone."""
    with _naming("datasets", source.path):
        if source.data_files is None and source.data_dir is None:
            splits = read_splits(source.path, config=source.name, streaming=streaming, config_option="name")
            rows = select_split(splits, source.split)
        else:
            named = source.data_files.values() if isinstance(source.data_files, dict) else [source.data_files]
            files = [file for group in named for file in ([group] if isinstance(group, str) else group or ())]
            with reading(source.path, files):
                rows = load_dataset(
                    source.path,
                    source.name,
                    data_dir=source.data_dir,
                    data_files=source.data_files,
                    split=source.split,
                    streaming=streaming,
                )
    return rows if source.columns is None else rows.select_columns(source.columns)  # pyright: ignore


def _select(splits: Splits, data: RowArguments, option: str) -> Rows:
    split = getattr(data, option)
    try:
        return select_split(splits, split)
    except SplitError as error:
        remedy = [] if data.dataset_name is None else [f"set `{option}`"]
        if option == "dataset_test_split":
            remedy += ["cut one with `test_split_size`", "or leave evaluation out"]
        told = ", ".join(remedy)
        raise ValueError(
            f"`{option}={split!r}`: the dataset has the split(s) {error.found}. {told[:1].upper()}{told[1:]}."
        ) from error
    except SourceError as error:
        raise ValueError(error.told("dataset_name", str(data.dataset_name))) from error


@contextmanager
def _naming(option: str, name: str) -> Iterator[None]:
    """Says by which option the user named a source that can't be read."""
    try:
        yield
    except SourceError as error:
        raise ValueError(error.told(option, name)) from error
