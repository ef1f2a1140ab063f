"""The datasets that a user passes to the trainer, checked before anything is loaded."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from otpo.weighting.token_values import TokenValues

from .preferences import require_preference_columns
from .token_values import require_columns


def check_datasets(
    train_dataset: Any,
    eval_dataset: Any,
    *,
    precompute: bool,
    tokens_per_batch: int | None = None,
    token_values: Sequence[TokenValues] = (),
) -> None:
    """Refuses what can be seen of the datasets before anything is loaded.

    Args:
        train_dataset: What the user passed to train on.
        eval_dataset: What the user passed to evaluate on: a dataset, several by name, or None.
        precompute: Whether the reference's log-probabilities are precomputed.
        tokens_per_batch: Tokens of a training batch, None where a number of pairs makes one.
        token_values: Numbers of tokens that the weighting has made of the data.

    Raises:
        TypeError: Something is no dataset; the message says how to make one, or which split to pass.
        ValueError: A column is missing, or a stream was to be read before training, or batched by lengths.
    """
    if train_dataset is not None and not isinstance(train_dataset, Dataset | IterableDataset | dict):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`. Make "
            "one with `datasets.Dataset.from_list(rows)`."
        )
    if isinstance(train_dataset, dict):
        splits = sorted(map(str, train_dataset)) or ["train"]
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(train_dataset).__name__}`. Pass "
            f"one of its splits, such as `train_dataset=dataset[{splits[0]!r}]`; it has {splits}."
        )
    if tokens_per_batch is not None and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"`tokens_per_batch={tokens_per_batch}` groups pairs by their lengths, and the train dataset is a stream, "
            "whose lengths nobody knows. Load it without streaming, or set `per_device_train_batch_size` instead."
        )
    named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **{f"eval_{name}": each for name, each in named.items()}}.items():
        if precompute and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`precompute_ref_log_probs=True` is not supported with IterableDataset, and the {name} dataset is a "
                "stream: it has to be read before training. Set `precompute_ref_log_probs=False`, or load it without "
                "streaming."
            )
    for name, dataset in named.items():
        if dataset is not None and not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. Make "
                "one with `datasets.Dataset.from_list(rows)`."
            )
    for name, dataset in [("train", train_dataset), *named.items()]:
        if dataset is not None:
            require_preference_columns(dataset, name)
            require_columns(dataset, token_values, name)
