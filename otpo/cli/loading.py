"""Data for the training commands: from the Hub, a saved folder, a local file, a mixture or what comes with otpo."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from otpo.data import load_demo_corpus, load_demo_instructions, load_demo_preferences
from otpo.data.demo import SPLITS

DEMO = "otpo/demo"
DEMO_INSTRUCTIONS = "otpo/demo-instructions"
DEMO_CORPUS = "otpo/demo-corpus"
_CORPUS_TRAIN, _CORPUS_TEST = 10_000, 500  # documents
_BUILDERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
_STREAM_SHUFFLE_BUFFER = 10_000

Rows = Dataset | IterableDataset
Splits = Mapping[Any, Any]
_SOURCES = f"a name on the Hub, a folder written by `save_to_disk`, a {', '.join(_BUILDERS)} file"


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
    data: DataArguments, mixture: DatasetMixtureConfig, *, seed: int, evaluate: bool
) -> tuple[Rows, Rows | None]:
    """[`load_rows`] with the numbers of pairs that `data` asks for."""
    limits = data.max_train_pairs, data.max_eval_pairs
    return load_rows(data, mixture, limits, seed=seed, evaluate=evaluate)


def load_rows(
    data: ScriptArguments,
    mixture: DatasetMixtureConfig,
    limits: tuple[int | None, int | None] = (None, None),
    *,
    seed: int,
    evaluate: bool,
) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those for evaluation when `evaluate` is set.

    Args:
        data: Name and splits.
        mixture: TRL's mixture of datasets, in place of a name. Its `test_split_size` also cuts a test split from a
            named dataset that has none.
        limits: How many rows of each are used, the first of a shuffle; None for all.
        seed: Seed of the shuffle and of the cut.
        evaluate: Whether a test split is needed.

    Raises:
        ValueError: No dataset is named or it can't be read, a split is missing, or two sources are named.
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
            cut = train.train_test_split(test_size=mixture.test_split_size, seed=seed)
            train, test = cut["train"], cut["test"]
        else:
            test = _split(splits, data.dataset_test_split, "dataset_test_split")
    return _first(train, limits[0], seed), None if test is None else _first(test, limits[1], seed)


def _load_splits(data: ScriptArguments, mixture: DatasetMixtureConfig) -> Splits:
    name = data.dataset_name
    if name and mixture.datasets:
        raise ValueError(f"Both `dataset_name={name!r}` and `datasets` name the data. Remove one of them.")
    if mixture.datasets:
        return get_dataset(mixture)
    if not name:
        raise ValueError(
            "No dataset is named. Set `dataset_name` to a name on the Hub, a folder written by `save_to_disk`, a "
            f"local {', '.join(_BUILDERS)} file, '{DEMO}', '{DEMO_INSTRUCTIONS}' or '{DEMO_CORPUS}', or list a "
            "mixture under `datasets` in the recipe."
        )
    if name in (DEMO, DEMO_INSTRUCTIONS, DEMO_CORPUS):
        return _load_demo(name, data)
    path = Path(name)
    builder = next((kind for ending, kind in _BUILDERS.items() if name.endswith(ending)), None)
    if path.is_file() or (builder and not path.is_dir()):
        if builder is None or not path.is_file():
            fault = "does not exist" if builder else "is of no kind that is read here"
            raise ValueError(f"`dataset_name`: the file {name} {fault}. Name a {', '.join(_BUILDERS)} file.")
        files = {data.dataset_train_split: name}
        return load_dataset(builder, data_files=files, streaming=data.dataset_streaming)  # pyright: ignore
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else {data.dataset_train_split: saved}
    try:
        return load_dataset(name, name=data.dataset_config, streaming=data.dataset_streaming)  # pyright: ignore
    except OSError as error:
        raise ValueError(
            f"`dataset_name={name!r}` is no local file or folder and was not found on the Hub: {error}"
        ) from error


def _load_demo(name: str, data: ScriptArguments) -> Splits:
    if name == DEMO:
        return {split: load_demo_preferences(split) for split in SPLITS}
    asked = data.dataset_config
    if asked is not None and not (str(asked).isdecimal() and int(asked)):
        raise ValueError(
            f"`dataset_config={asked!r}`: of `{name}` it is the number of rows to train on, at least 1, such as 20000."
        )
    count = None if asked is None else int(asked)
    if name == DEMO_INSTRUCTIONS:
        return {split: load_demo_instructions(split, count=count if split == "train" else None) for split in SPLITS}
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


def _first(rows: Rows, count: int | None, seed: int) -> Rows:
    if count is None:
        return rows
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=seed).select(range(min(count, len(rows))))
    return rows.shuffle(seed=seed, buffer_size=_STREAM_SHUFFLE_BUFFER).take(count)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for all of them.")
