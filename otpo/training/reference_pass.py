"""The pass of the reference over a dataset before training, stored beside the dataset for the next run.

Shapes: B pairs, W width of padded rows.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .reference_cache import cache_file, stored_under, write_rows
from .stored_rows import pack_rows

Score = Callable[[Mapping[str, Any]], Tensor]
"""From a batch to the reference's log-probability of each token, `(2B, T)`."""


def with_reference_rows(
    dataset: Dataset, name: str, key: int, accelerator: Accelerator, make_rows: Callable[[], Iterator[Any]]
) -> Dataset:
    """The dataset with the reference's log-probabilities in columns: its own, those of an earlier run, or new ones.

    All processes have to call it.

    Args:
        dataset: Rows of tokens.
        name: What the dataset is called.
        key: What the log-probabilities depend on, see [`otpo.training.reference_cache.reference_key`].
        accelerator: The trainer's.
        make_rows: Starts the pass, see [`reference_rows`]. It is not called where the rows are there already.

    Raises:
        ValueError: The dataset brings such columns of another key.
    """
    # Shards and files differ between processes, and all must go the same way: the first one's.
    agreed = [key, cache_file(dataset, key).exists()]
    broadcast_object_list(agreed, from_process=0)
    key, is_there = agreed
    if stored_under(dataset, key, name):
        return dataset

    # The pass runs on all processes, and the first one writes what it finds.
    path = cache_file(dataset, key)
    if not is_there:
        rows = make_rows()
        if accelerator.is_main_process:
            write_rows(path, key, rows)
        else:
            for _ in rows:
                pass
        accelerator.wait_for_everyone()
    return concatenate_datasets([dataset, Dataset.from_file(str(path))], axis=1)


def reference_rows(
    loader: DataLoader, name: str, score: Score, accelerator: Accelerator, *, quiet: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The reference's log-probabilities of a dataset's completions, batch by batch, on all processes.

    Args:
        loader: Batches of the dataset, not prepared.
        name: What the dataset is called, for the progress bar.
        score: Asks the reference.
        accelerator: The trainer's.
        quiet: Whether no progress is shown.

    Yields:
        Padded rows `(2B, W)`, chosen responses first, and how many of each are tokens `(2B,)`, of all processes.
    """
    for inputs in tqdm(
        accelerator.prepare(loader),
        desc=f"Reference log-probabilities of the {name} dataset",
        disable=quiet or not accelerator.is_local_main_process,
    ):
        mask = inputs["completion_mask"][:, 1:].bool()
        sides: list[Any] = []
        for part, side in zip(score(inputs).chunk(2), mask.chunk(2), strict=True):
            rows = accelerator.pad_across_processes(pack_rows(part, side), dim=1)
            sides.append(accelerator.gather_for_metrics((rows, side.sum(1))))
        width = max(rows.size(1) for rows, _ in sides)
        padded = [torch.nn.functional.pad(rows, (0, width - rows.size(1))) for rows, _ in sides]
        yield torch.cat(padded).cpu(), torch.cat([counts for _, counts in sides]).cpu()
