"""Which pairs make a micro-batch when a number of tokens bounds it, as arithmetic on token counts.

W processes share an epoch's pairs. A *row of pairs* is one pair for each process, all of similar length; a micro-step
is some rows, so that each process has as many pairs as any other, as TRL's exchange of metrics needs, and about as
many tokens.

Batches of similar length and random batches exclude each other: sorted as a whole, pairs would meet the same company
in every epoch. So pairs meet within windows of a shuffled order, as with transformers' length grouping. A window is 50
micro-steps wide, but at most a quarter of the data. A wider window makes batches more even, a narrower one makes them
more random; in either, a micro-step has pairs of one length, which accumulation over shuffled micro-steps mixes.
Windows are sorted up and down in turn, so that lengths go on where one window meets the next, and batches are cut out
of one long sequence.

All epochs have the same number of micro-steps, since transformers plans its schedule by the first one's.

Nothing here loops over rows. Shapes: N pairs, W processes, R rows of W pairs, M micro-steps.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_WINDOW = 50  # micro-steps, as transformers' `LengthGroupedSampler` has batches in a mega-batch
_LEAST_WINDOWS = 4  # as there
# Micro-steps are fewer in one epoch than in another; of large data by far less than this share.
_SLACK = 0.01


def pair_tokens(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, max_length: int | None) -> np.ndarray:
    """How many tokens of each pair are run, `(N,)` int64: its chosen and its rejected row, each with the prompt.

    Both ways of `trl.trainer.dpo_trainer.DataCollatorForPreference` to truncate a row leave `max_length` tokens of it.

    Args:
        prompt: Tokens of each prompt, `(N,)` int64, and so are the others of each completion.
        chosen: See `prompt`.
        rejected: See `prompt`.
        max_length: Tokens that are left of a row, at least 1; None for all.
    """
    rows = [prompt + completion for completion in (chosen, rejected)]
    return sum(rows if max_length is None else [np.minimum(row, max_length) for row in rows], np.zeros_like(prompt))


def check_budget_options(args: Any) -> None:
    """Refuses options that contradict `tokens_per_batch`, where that is set.

    Args:
        args: The trainer's options.

    Raises:
        ValueError: The budget is below 1, or another option wants to decide on batches too, or on what is in them.
    """
    budget = args.tokens_per_batch
    if budget is None:
        return
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"`tokens_per_batch` must be a whole number of at least 1, got {budget!r}.")
    named = f"`tokens_per_batch={budget}`"
    if args.auto_find_batch_size:
        raise ValueError(
            f"`auto_find_batch_size=True` lowers `per_device_train_batch_size`, which makes no batches under {named}. "
            "Set it to false, and `tokens_per_batch` to what fits."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy}` orders the pairs, and so does {named}, by "
            "their lengths. Set one of the two."
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"`{name}` of `accelerator_config` divides batches among processes, and {named} makes one for each. "
                "Set it to false."
            )
    sorting = [name for name in args.loss_type if name.startswith("aot")]
    if sorting:
        raise ValueError(
            f"`loss_type={sorting[0]}` sorts the pairs of a micro-batch, so its loss depends on how many there are, "
            f"and under {named} that changes from one to the next. Set `per_device_train_batch_size` instead."
        )


@dataclass(frozen=True)
class EpochPlan:
    """The micro-batches of one epoch.

    Attributes:
        rows: Numbers of pairs, `(R, W)` int64; the columns are the processes.
        bounds: Micro-step `m` in `order` is the rows from `bounds[m]` to `bounds[m + 1]`, `(M + 1,)` int64.
        order: In which the micro-steps are taken, `(M,)` int64.
        repeated: How many of the last row's pairs, counted from its end, were in the row before. They give the last
            processes something to run, and must not count. The last row is a micro-step by itself then.
    """

    rows: np.ndarray
    bounds: np.ndarray
    order: np.ndarray
    repeated: int

    def batch(self, step: int, process: int) -> tuple[list[int], int, int]:
        """A process's pairs in the `step`-th micro-step; how many of them count; how many of all processes' do."""
        place = self.order[step]
        first, last = self.bounds[place], self.bounds[place + 1]
        pairs = self.rows[first:last, process].tolist()
        if self.repeated and last == len(self.rows):
            own = self.rows.shape[1] - self.repeated
            return pairs, int(process < own), own
        return pairs, len(pairs), len(pairs) * self.rows.shape[1]


@dataclass(frozen=True)
class TokenBudget:
    """Micro-batches of as many pairs of similar length as fit a number of tokens, for each epoch.

    Every pair is in one micro-batch of an epoch. Where the processes don't divide N, the N modulo W pairs that are
    left, of middle length, are a micro-step of their own, in which the other processes repeat a pair that does not
    count; with `drop_last` there is no such micro-step. A pair above the budget is a micro-batch by itself; the other
    processes have the next longest ones beside it.

    Attributes:
        tokens: Of each pair, `(N,)` int64, at least one pair.
        budget: Tokens of a process's micro-batch, at least 1.
        processes: W, at least 1.
        seed: Of the shuffling, together with the epoch's number.
        drop_last: Whether pairs that the processes can't share are left out.

    Raises:
        ValueError: No pair is left.
    """

    tokens: np.ndarray
    budget: int
    processes: int
    seed: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(
                f"`dataloader_drop_last=True` leaves none of {len(self.tokens)} pair(s) for {self.processes} "
                "process(es). Set it to false, or run fewer processes."
            )

    def __len__(self) -> int:
        """Micro-steps of each epoch, M."""
        return self._full_steps + bool(self._left)

    @property
    def pairs_per_batch(self) -> float:
        """The mean number of pairs of a process's micro-batch."""
        dropped = len(self.tokens) % self.processes if self.drop_last else 0
        return (len(self.tokens) - dropped) / (len(self) * self.processes)

    def epoch(self, number: int) -> EpochPlan:
        """The micro-batches of an epoch; the same for the same data, seed, number and processes."""
        draw = np.random.default_rng([self.seed % 2**64, number])
        shuffled = draw.permutation(len(self.tokens))

        # Wider windows end at the sorted whole, which needs no more micro-steps than there are.
        windows = self._windows
        rows, left, starts = self._cut(shuffled, windows)
        while len(starts) > self._full_steps:
            windows //= 2
            rows, left, starts = self._cut(shuffled, windows)

        # Rows are dealt forth and back, so that no process has the longer pair of each of them.
        bounds = split_to(np.append(starts, len(rows)), self._full_steps)
        turned = (np.arange(len(rows)) - np.repeat(bounds[:-1], np.diff(bounds))) % 2 == 1
        rows[turned] = rows[turned, ::-1]

        # Pairs that the processes can't share come last, and make a row with some of them repeated.
        repeated = 0
        if len(left) and not self.drop_last:
            rows = np.concatenate([rows, np.resize(left, (1, self.processes))])
            bounds = np.append(bounds, len(rows))
            repeated = self.processes - len(left)
        return EpochPlan(rows, bounds, draw.permutation(len(bounds) - 1), repeated)

    @cached_property
    def _full_steps(self) -> int:
        """Micro-steps of an epoch in which each process has pairs of its own."""
        rows = len(self.tokens) // self.processes
        if not rows:
            return 0
        shuffled = np.random.default_rng([self.seed % 2**64, 0]).permutation(len(self.tokens))
        counts = [len(self._cut(shuffled, windows)[2]) for windows in (self._windows, 1)]
        return min(rows, int(np.ceil(max(counts) * (1 + _SLACK))))

    @property
    def _left(self) -> int:
        return 0 if self.drop_last else len(self.tokens) % self.processes

    @cached_property
    def _windows(self) -> int:
        """In how many windows pairs are sorted together."""
        mean = np.minimum(self.tokens, self.budget).mean()
        wanted = _WINDOW * self.processes * max(1, int(self.budget / max(mean, 1)))
        return min(len(self.tokens), max(_LEAST_WINDOWS, round(len(self.tokens) / wanted)))

    def _cut(self, shuffled: np.ndarray, windows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of pairs, `(R, W)`, the pairs that make no row, and the first row of each micro-step."""
        pairs = shuffled[window_order(self.tokens[shuffled], windows)]
        # In a window's middle the neighbours are most alike.
        count = len(pairs) % self.processes
        middle = max(0, len(pairs) // windows - count) // 2
        left = pairs[middle : middle + count]
        rows = np.delete(pairs, slice(middle, middle + count)).reshape(-1, self.processes)
        return rows, left, cut_by_budget(self.tokens[rows].max(1), self.budget)


def window_order(tokens: np.ndarray, windows: int) -> np.ndarray:
    """An order in which each window of a sequence is sorted by tokens, up and down in turn, the last one down, `(N,)`.

    Args:
        tokens: `(N,)` int64.
        windows: How many windows of equal width, between 1 and N.
    """
    window = np.arange(len(tokens)) * windows // len(tokens)
    goes_up = (windows - window) % 2 == 0
    return np.lexsort((np.where(goes_up, tokens, -tokens), window))


def cut_by_budget(costs: np.ndarray, budget: int) -> np.ndarray:
    """Where groups of a sequence start, each as long as the budget allows, with one member at least.

    Args:
        costs: Of each member, `(R,)` int64, at least 0.
        budget: What a group may cost.

    Returns:
        The first member of each group, in order, int64.
    """
    spent = np.concatenate([[0], np.cumsum(costs)])
    after = np.maximum(np.searchsorted(spent, spent[:-1] + budget, side="right") - 1, np.arange(1, len(spent)))
    # Where a group ends says where the next one starts: a walk over groups.
    following, starts, place = after.tolist(), [], 0
    while place < len(following):
        starts.append(place)
        place = following[place]
    return np.array(starts, dtype=np.int64)


def split_to(bounds: np.ndarray, count: int) -> np.ndarray:
    """Bounds of `count` groups, by halving the largest of fewer groups.

    Args:
        bounds: `(G + 1,)` int64 of G groups, G at most `count`.
        count: At most as many as there are members.
    """
    while len(bounds) - 1 < count:
        sizes = np.diff(bounds)
        largest = np.argsort(-sizes, kind="stable")[: count - len(sizes)]
        largest = largest[sizes[largest] > 1]
        bounds = np.sort(np.concatenate([bounds, bounds[largest] + sizes[largest] // 2]))
    return bounds
