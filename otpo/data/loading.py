"""Data for the training commands: from the Hub, a saved folder, a local file, a mixture or what comes with otpo."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from otpo.data import load_demo_corpus, load_demo_instructions, load_demo_preferences
from otpo.data.demo import SPLITS
from otpo.data.rows import check_pairs

from .files import BUILDERS, builder_options, reading

DEMO = "otpo/demo"
DEMO_INSTRUCTIONS = "otpo/demo-instructions"
DEMO_CORPUS = "otpo/demo-corpus"
BUNDLED = (DEMO, DEMO_INSTRUCTIONS, DEMO_CORPUS)
_CORPUS_TRAIN, _CORPUS_TEST = 10_000, 500  # documents
_STREAM_SHUFFLE_BUFFER = 10_000

Rows = Dataset | IterableDataset
Splits = Mapping[Any, Any]
Check = Callable[[Rows, str, Sequence[int] | None], Rows]
"""Looks at each row of a dataset that is called so, whose rows have these numbers; hands the dataset on."""
_SOURCES = f"a name on the Hub, a folder written by `save_to_disk`, a {', '.join(BUILDERS)} file"


@dataclass
class RowArguments(ScriptArguments):
    """Where the data comes from, beyond [`trl.ScriptArguments`], and how much of it is used.

    Parameters:
        dataset_name: Name on the Hub, folder written by `save_to_disk`, local file, `"otpo/demo-instructions"` or
            `"otpo/demo-corpus"`; `dataset_config` is of these the number of rows to train on.
        max_train_rows: Rows to train on, the first of a shuffle with `seed`, >= 1. None: all.
        max_eval_rows: The same for evaluation.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"The data: {_SOURCES}, or '{DEMO_INSTRUCTIONS}' or '{DEMO_CORPUS}', which come with otpo and of "
            "which `dataset_config` is the number of rows to train on."
        },
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Rows to train on: the first of a shuffle with `seed`. Unset: all."}
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Rows to evaluate on: the first of a shuffle with `seed`. Unset: all."}
    )

    def __post_init__(self) -> None:
        _check_counts(max_train_rows=self.max_train_rows, max_eval_rows=self.max_eval_rows)


@dataclass
class DataArguments(ScriptArguments):
    """Where the pairs come from, beyond [`trl.ScriptArguments`], and how many of them are used.

    Parameters:
        dataset_name: Name on the Hub, folder written by `save_to_disk`, local file or `"otpo/demo"`.
        max_train_pairs: Pairs to train on, the first of a shuffle with `seed`, >= 1. None: all.
        max_eval_pairs: The same for evaluation.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"Preference pairs: {_SOURCES}, or '{DEMO}' for the set that comes with otpo."},
    )
    max_train_pairs: int | None = field(
        default=None, metadata={"help": "Pairs to train on: the first of a shuffle with `seed`. Unset: all."}
    )
    max_eval_pairs: int | None = field(
        default=None, metadata={"help": "Pairs to evaluate on: the first of a shuffle with `seed`. Unset: all."}
    )

    def __post_init__(self) -> None:
        _check_counts(max_train_pairs=self.max_train_pairs, max_eval_pairs=self.max_eval_pairs)


def load_pairs(
    data: DataArguments, mixture: DatasetMixtureConfig, *, seed: int, evaluate: bool, check: Check = check_pairs
) -> tuple[Rows, Rows | None]:
    """[`load_rows`] with the numbers of pairs that `data` asks for, each pair looked at."""
    limits = data.max_train_pairs, data.max_eval_pairs
    return load_rows(data, mixture, limits, seed=seed, evaluate=evaluate, check=check)


def unchecked(rows: Rows, name: str, numbers: Sequence[int] | None) -> Rows:
    """The [`Check`] that looks at nothing."""
    return rows


def load_rows(
    data: ScriptArguments,
    mixture: DatasetMixtureConfig,
    limits: tuple[int | None, int | None] = (None, None),
    *,
    seed: int,
    evaluate: bool,
    check: Check = unchecked,
) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those for evaluation when `evaluate` is set.

    Args:
        data: Name and splits.
        mixture: TRL's mixture of datasets, in place of a name. Its `test_split_size` also cuts a test split from a
            named dataset that has none.
        limits: How many rows of each are used, the first of a shuffle; None for all.
        seed: Seed of the shuffle and of the cut.
        evaluate: Whether a test split is needed.
        check: Looks at the rows that are used.

    Raises:
        ValueError: No dataset is named or it can't be read, a split is missing, two sources are named, or `check`
            refuses a row.
    """
    if mixture.test_split_size is not None and mixture.test_split_size >= 1:
        mixture = replace(mixture, test_split_size=int(mixture.test_split_size))  # `datasets` takes 4 but not 4.0
    splits = _load_splits(data, mixture)
    train = _split(splits, data.dataset_train_split, "dataset_train_split")
    test = None
    if evaluate:
        if data.dataset_test_split not in splits and mixture.test_split_size is not None:
            if not isinstance(train, Dataset):
                raise ValueError(
                    f"`test_split_size={mixture.test_split_size}` can't cut a stream. Set `dataset_streaming=False`, "
                    "or name a split of the dataset with `dataset_test_split`."
                )
            train = check(train, "training", None)  # before the cut, which moves the rows
            cut = train.train_test_split(test_size=mixture.test_split_size, seed=seed)  # pyright: ignore
            train, test = cut["train"], cut["test"]
            check = unchecked
        else:
            test = _split(splits, data.dataset_test_split, "dataset_test_split")
    train = _first(train, limits[0], seed, "training", check)
    return train, None if test is None else _first(test, limits[1], seed, "evaluation", check)


def _load_splits(data: ScriptArguments, mixture: DatasetMixtureConfig) -> Splits:
    name = data.dataset_name
    if name and mixture.datasets:
        raise ValueError(f"Both `dataset_name={name!r}` and `datasets` name the data. Remove one of them.")
    if mixture.datasets:
        named = [dataset.data_files for dataset in mixture.datasets]
        groups = [files.values() if isinstance(files, dict) else files for files in named]
        files = [file for group in groups for file in ([group] if isinstance(group, str) else group or ())]
        with reading("datasets", ", ".join(dataset.path for dataset in mixture.datasets), files):
            return get_dataset(mixture)
    if not name:
        raise ValueError(
            "No dataset is named. Set `dataset_name` to a name on the Hub, a folder written by `save_to_disk`, a "
            f"local {', '.join(BUILDERS)} file, '{DEMO}', '{DEMO_INSTRUCTIONS}' or '{DEMO_CORPUS}', or list a "
            "mixture under `datasets` in the recipe."
        )
    require_unambiguous("dataset_name", name)
    if name in BUNDLED:
        return _load_demo(name, data)
    path = Path(name)
    options = builder_options(name)
    if path.is_file() or (options and not path.is_dir()):
        if options is None or not path.is_file():
            fault = "does not exist" if options else "is of no kind that is read here"
            raise ValueError(f"`dataset_name`: the file {name} {fault}. Name a {', '.join(BUILDERS)} file.")
        with reading("dataset_name", name):
            files = {data.dataset_train_split: name}
            splits: Any = load_dataset(**options, data_files=files, streaming=data.dataset_streaming)
            rows = splits[data.dataset_train_split]
            next(iter(rows))  # a stream's file is opened here; one without rows ends
            if isinstance(rows, Dataset):
                rows.data.validate(full=True)  # which finds text that is no UTF-8
        return splits
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with reading("dataset_name", name):
            saved = load_from_disk(name)
        splits = saved if isinstance(saved, DatasetDict) else {data.dataset_train_split: saved}
        return _streamed(splits, data.dataset_streaming)
    try:
        return load_dataset(name, name=data.dataset_config, streaming=data.dataset_streaming)  # pyright: ignore
    except OSError as error:
        raise ValueError(
            f"`dataset_name={name!r}` is no local file or folder and was not found on the Hub: {error}"
        ) from error


def require_unambiguous(option: str, name: str) -> None:
    """Raises a `ValueError` when both a bundled dataset and a local file or folder are called so."""
    if name in BUNDLED and Path(name).exists():
        raise ValueError(
            f"`{option}={name}` is both the set that comes with otpo and something in this folder. Write `./{name}` "
            "for yours, or rename it."
        )


def _streamed(splits: Splits, streaming: bool) -> Splits:
    """The splits as streams, if asked for; those that are streams stay as they are."""
    if not streaming:
        return splits
    return {name: rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows for name, rows in splits.items()}


def _load_demo(name: str, data: ScriptArguments) -> Splits:
    if name == DEMO:
        return _streamed({split: load_demo_preferences(split) for split in SPLITS}, data.dataset_streaming)
    asked = data.dataset_config
    if asked is not None and not (str(asked).isdecimal() and int(asked)):
        raise ValueError(
            f"`dataset_config={asked!r}`: of `{name}` it is the number of rows to train on, at least 1, such as 20000."
        )
    count = None if asked is None else int(asked)
    if name == DEMO_INSTRUCTIONS:
        rows = {split: load_demo_instructions(split, count=count if split == "train" else None) for split in SPLITS}
        return _streamed(rows, data.dataset_streaming)
    return {
        "train": load_demo_corpus("train", count or _CORPUS_TRAIN, streaming=data.dataset_streaming),
        "test": load_demo_corpus("test", _CORPUS_TEST),
    }


def _split(splits: Splits, name: str, option: str) -> Rows:
    if name in splits:
        return splits[name]
    remedy = "" if option == "dataset_train_split" else ", cut one with `test_split_size`, or leave evaluation out"
    found = sorted(map(str, splits))
    raise ValueError(f"`{option}={name!r}`: the dataset has the split(s) {found}. Set `{option}`{remedy}.")


def _first(rows: Rows, count: int | None, seed: int, name: str, check: Check) -> Rows:
    """The first rows of a shuffle, each looked at."""
    if count is None:
        return check(rows, name, None)
    if isinstance(rows, Dataset):
        # The order of `Dataset.shuffle`, which does not tell the rows' numbers.
        numbers = np.random.default_rng(seed).permutation(len(rows))[:count].tolist()
        return check(rows.select(numbers), name, numbers)
    return check(rows, name, None).shuffle(seed=seed, buffer_size=_STREAM_SHUFFLE_BUFFER).take(count)  # pyright: ignore


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for all of them.")
