"""Preference pairs for `otpo align`: from the Hub, a saved folder, a local file, a mixture or the bundled set."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from otpo.data import load_demo_preferences

DEMO = "otpo/demo"
_DEMO_SPLITS = ("train", "test", "test_templates")
_BUILDERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
_STREAM_SHUFFLE_BUFFER = 10_000

Pairs = Dataset | IterableDataset
Splits = Mapping[Any, Any]


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
        metadata={
            "help": "Preference pairs: a name on the Hub, a folder written by `save_to_disk`, a .jsonl, .json, "
            f".jsonl.gz or .parquet file, or '{DEMO}' for the set that comes with otpo."
        },
    )
    max_train_pairs: int | None = field(
        default=None, metadata={"help": "Pairs to train on: the first of a shuffle with `seed`. Unset: all."}
    )
    max_eval_pairs: int | None = field(
        default=None, metadata={"help": "Pairs to evaluate on: the first of a shuffle with `seed`. Unset: all."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_pairs", "max_eval_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for all pairs.")


def load_pairs(
    data: DataArguments, mixture: DatasetMixtureConfig, *, seed: int, evaluate: bool
) -> tuple[Pairs, Pairs | None]:
    """The training pairs, and those for evaluation when `evaluate` is set.

    Args:
        data: Name, splits and numbers of pairs.
        mixture: TRL's mixture of datasets, in place of a name. Its `test_split_size` also cuts a test split from a
            named dataset that has none.
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
    return _first(train, data.max_train_pairs, seed), None if test is None else _first(test, data.max_eval_pairs, seed)


def _load_splits(data: DataArguments, mixture: DatasetMixtureConfig) -> Splits:
    name = data.dataset_name
    if name and mixture.datasets:
        raise ValueError(f"Both `dataset_name={name!r}` and `datasets` name the pairs. Remove one of them.")
    if mixture.datasets:
        return get_dataset(mixture)
    if not name:
        raise ValueError(
            "No dataset is named. Set `dataset_name` to a name on the Hub, a folder written by `save_to_disk`, a "
            f"local {', '.join(_BUILDERS)} file or '{DEMO}', or list a mixture under `datasets` in the recipe."
        )
    if name == DEMO:
        return {split: load_demo_preferences(split) for split in _DEMO_SPLITS}
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


def _split(splits: Splits, name: str, option: str) -> Pairs:
    if name in splits:
        return splits[name]
    remedy = "" if option == "dataset_train_split" else ", cut one with `test_split_size`, or leave evaluation out"
    found = sorted(map(str, splits))
    raise ValueError(f"`{option}={name!r}`: the dataset has the split(s) {found}. Set `{option}`{remedy}.")


def _first(pairs: Pairs, count: int | None, seed: int) -> Pairs:
    if count is None:
        return pairs
    if isinstance(pairs, Dataset):
        return pairs.shuffle(seed=seed).select(range(min(count, len(pairs))))
    return pairs.shuffle(seed=seed, buffer_size=_STREAM_SHUFFLE_BUFFER).take(count)
