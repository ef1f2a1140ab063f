"""Keys, sizes and places of the precomputed, per-token reference log-probabilities."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config

from .data.validation import ROWS_AT_ONCE, TOKEN_COLUMNS


def longest_completion(dataset: Dataset, max_length: int | None) -> int:
    """Tokens of the longest completion that can be left after truncation to `max_length`."""
    longest = max(int(lengths.max()) for lengths, _ in _columns(dataset, ("chosen_ids", "rejected_ids")))
    return longest if max_length is None else min(longest, max_length)


def dataset_key(dataset: Dataset, *settings: Any) -> str:
    """A cache key made of the tokens and of the settings that decide which of them are scored.

    TRL's own key follows the dataset's fingerprint, which changes with options that don't matter, and does not
    tell sums from per-token rows. This one changes exactly when the rows would.
    """
    digest = hashlib.blake2b(b"otpo: reference log-probabilities per token", digest_size=16)
    digest.update(repr(settings).encode())
    for lengths, tokens in _columns(dataset, TOKEN_COLUMNS):
        digest.update(lengths.tobytes())
        digest.update(tokens.tobytes())
    return digest.hexdigest()


def _columns(dataset: Dataset, names: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The lengths of a column's lists, and their tokens one after another, for each batch and column."""
    for batch in dataset.select_columns(list(names)).with_format("arrow").iter(ROWS_AT_ONCE):
        for name in names:
            lists = batch[name].combine_chunks()  # pyright: ignore
            lengths, tokens = lists.value_lengths(), lists.flatten()
            yield lengths.to_numpy(zero_copy_only=False), tokens.to_numpy(zero_copy_only=False)


def shared_cache_file(fingerprint: str) -> str:
    """Where the rows of a dataset that lives in memory are kept.

    `datasets` gives such a dataset a folder of its own in each process, where no other process looks.
    """
    folder = Path(config.HF_DATASETS_CACHE) / "otpo"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"cache-{fingerprint}.arrow")
