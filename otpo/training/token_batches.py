"""Micro-batches by a number of tokens in transformers' training loop: the loader, and what each batch says of itself.

The batches of [`otpo.data.token_budget`] have different numbers of pairs, and a step's gradient is the mean over its
pairs. So each batch carries two numbers through the loader, on the host, where no one waits for the device: how many
pairs of it count, and how many pairs of all processes. They are with the batch wherever workers, resumed runs and
several epochs bring it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from otpo.data.token_budget import EpochPlan, TokenBudget, pair_tokens
from otpo.data.token_table import TOKEN_COLUMNS, column_lengths
from otpo.trl_seam import has_own_sampler, loader_of_process, loss_factor

logger = logging.get_logger(__name__)

SHARE = "batch_share"
"""Where a batch carries its [`BatchShare`]."""


@dataclass(frozen=True)
class BatchShare:
    """A micro-batch's part in its step.

    Attributes:
        pairs: Its pairs, without repeated ones; 0 where all are.
        of_all: Those of all processes in the same micro-step.
        factor: What the micro-batch's mean loss is multiplied by so that a step's loss and gradient are means over
            its pairs; 1 until [`share_steps`] knows the step.
    """

    pairs: int
    of_all: int
    factor: float = 1.0

    def kept(self, there: int) -> int | None:
        """How many of the pairs that are `there` in all processes count, the first ones; None for all."""
        return self.of_all if self.of_all < there else None


class TokenBatchSampler(Sampler[list[int]]):
    """One process's micro-batches, as lists of numbers of rows that carry their [`BatchShare`].

    Args:
        budget: The micro-batches of all processes.
        process: The number of this process, from 0.
    """

    def __init__(self, budget: TokenBudget, process: int) -> None:
        self.budget, self.process = budget, process
        self.epoch = 0

    @property
    def sampler(self) -> "TokenBatchSampler":
        """Itself: in a resumed epoch, accelerate looks here for what it tells the epoch's number to."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that is iterated over next, numbered from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of each epoch."""
        return len(self.budget)

    def __iter__(self) -> Iterator[list[int]]:
        """The epoch's micro-batches."""
        plan: EpochPlan = self.budget.epoch(self.epoch)
        for step in range(len(self)):
            pairs, own, of_all = plan.batch(step, self.process)
            yield _SharedRows(pairs, BatchShare(own, of_all))


class _SharedRows(list[int]):
    """Numbers of rows on their way from the sampler to the dataset, perhaps in a worker."""

    def __init__(self, rows: Sequence[int] = (), share: BatchShare | None = None) -> None:
        super().__init__(rows)
        self.share = share


class SharedBatches(Dataset[Any]):
    """A dataset that is read in the batches of a [`TokenBatchSampler`] and hands on what they carry.

    Args:
        rows: The dataset.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Rows of the dataset."""
        return len(self.rows)

    def __getitems__(self, batch: Any) -> tuple[list[Any], BatchShare]:
        """The rows of a batch, and its share, for [`SharedCollator`]."""
        return self.rows.__getitems__(batch), batch.share


class SharedCollator:
    """Makes a batch of what [`SharedBatches`] returns.

    Args:
        collator: Makes it of the rows alone.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, read: Any) -> dict[str, Any]:
        """The collated rows, with their share at [`SHARE`]."""
        rows, share = read
        return {**self.collator(rows), SHARE: share}


def share_steps(batches: Sequence[dict[str, Any]], processes: int) -> None:
    """Tells the micro-batches of an optimizer step their factors; batches without a share stay as they are.

    Args:
        batches: This process's, in their order.
        processes: How many there are.
    """
    shares: list[BatchShare] = [batch[SHARE] for batch in batches if SHARE in batch]
    if not shares:
        return
    of_step = sum(share.of_all for share in shares)
    for batch, share in zip(batches, shares, strict=True):
        batch[SHARE] = replace(share, factor=loss_factor(share.pairs, of_step, len(batches), processes))


def make_budget(trainer: Any) -> TokenBudget:
    """The micro-batches of a trainer's `tokens_per_batch`. Says which pairs are above it, in the first process.

    Args:
        trainer: An [`otpo.OTPOTrainer`] with a training dataset.

    Raises:
        ValueError: The dataset or the processes don't go with a number of tokens; the message says what to set.
    """
    args, dataset = trainer.args, trainer.train_dataset
    named = f"`tokens_per_batch={args.tokens_per_batch}`"
    if not set(TOKEN_COLUMNS) <= set(dataset.column_names):
        raise ValueError(
            f"{named} counts the tokens of a dataset, and pairs with images get theirs when a batch is made. Set "
            "`per_device_train_batch_size` instead."
        )
    if has_own_sampler(trainer):
        raise ValueError(
            f"{type(trainer).__name__} has a sampler of its own, and {named} orders the pairs by their lengths. "
            "Remove one of the two."
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(
            f"{named} makes a batch for each process, and tensor, context or sequence parallelism shares batches "
            "among processes. Set `per_device_train_batch_size` instead."
        )

    prompt, chosen, rejected = column_lengths(dataset, TOKEN_COLUMNS)
    tokens = pair_tokens(prompt, chosen, rejected, args.max_length)
    above = int((tokens > args.tokens_per_batch).sum())
    if above and trainer.is_world_process_zero():
        longest = int(tokens.argmax())
        known = trainer.prepared_datasets.get(dataset)
        row = longest if known is None else known.original(longest)
        logger.warning(
            f"{above} pair(s) have more tokens than {named}, each of which makes a micro-batch by itself. The "
            f"longest, row {row} of the training dataset, has {tokens[longest]}: memory has to suffice for it, or "
            "set a lower `max_length`."
        )
    seed = args.seed if args.data_seed is None else args.data_seed
    processes = trainer.accelerator.num_processes
    return TokenBudget(tokens, args.tokens_per_batch, processes, seed, args.dataloader_drop_last)


def make_loader(trainer: Any, budget: TokenBudget, dataset: Any) -> DataLoader:
    """The loader of this process's micro-batches, with the options that transformers' has.

    Args:
        trainer: An [`otpo.OTPOTrainer`].
        budget: Its micro-batches.
        dataset: Its training dataset, with the columns that the collator needs.
    """
    args, process = trainer.args, trainer.accelerator.process_index
    loader = DataLoader(
        SharedBatches(dataset),
        batch_sampler=TokenBatchSampler(budget, process),
        collate_fn=SharedCollator(trainer.data_collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=process),
    )
    return loader_of_process(trainer.accelerator, loader)
