"""Keys, sizes and places of the precomputed, per-token reference log-probabilities."""

import hashlib
from pathlib import Path
from typing import Any

from datasets import Dataset, config

_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_ROWS_AT_ONCE = 1000


def longest_completion(dataset: Dataset, max_length: int | None) -> int:
    """Tokens of the longest completion that can be left after truncation to `max_length`."""
    lengths = (
        len(ids)
        for batch in dataset.select_columns(["chosen_ids", "rejected_ids"]).iter(_ROWS_AT_ONCE)
        for column in ("chosen_ids", "rejected_ids")
        for ids in batch[column]  # pyright: ignore
    )
    longest = max(lengths)
    return longest if max_length is None else min(longest, max_length)


def dataset_key(dataset: Dataset, *settings: Any) -> str:
    """A cache key made of the tokens and of the settings that decide which of them are scored.

    TRL's own key follows the dataset's fingerprint, which changes with options that don't matter, and does not
    tell sums from per-token rows. This one changes exactly when the rows would.
    """
    digest = hashlib.blake2b(b"otpo: reference log-probabilities per token", digest_size=16)
    digest.update(repr(settings).encode())
    for batch in dataset.select_columns(list(_TOKENS)).with_format("arrow").iter(_ROWS_AT_ONCE):
        for column in _TOKENS:
            lists = batch[column].combine_chunks()  # pyright: ignore
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def shared_cache_file(fingerprint: str) -> str:
    """Where the rows of a dataset that lives in memory are kept.

    `datasets` gives such a dataset a folder of its own in each process, where no other process looks.
    """
    folder = Path(config.HF_DATASETS_CACHE) / "otpo"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"cache-{fingerprint}.arrow")
