"""Numbers of pairs on their way to the log, in training and in evaluations apart.

TRL averages its numbers over micro-batches. In training each micro-batch has the same share in a step's loss, so
that is right there, unless a number of tokens makes batches; an evaluation is of pairs, and its last batch is smaller.

Shapes: B pairs of this process's micro-batch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .metrics import averaged_over_pairs, pair_similarity, reward_metrics, weight_metrics
from .scoring import Scored
from .timing import DeviceTimer

_TIMES = "transport/ms"
_LARGEST = "transport/"  # of these numbers the largest of a micro-batch is logged, of all others the mean


@dataclass(frozen=True)
class PairTable:
    """Numbers of a micro-batch's pairs, on the device, that are logged beside TRL's.

    Attributes:
        names: Of the columns, the mean loss left out.
        own: Those of them that the weighting has named.
        values: `(B, K + 1)` float32: a column for each of the K names, and the micro-batch's mean loss.
    """

    names: list[str]
    own: Collection[str]
    values: Tensor

    def summary(self) -> Tensor:
        """Of each column the sum, how many numbers it is of, and the largest, `(3, K + 1)`, see [`table_summary`]."""
        return table_summary(self.values)


class PairLog:
    """Collects numbers of each micro-batch beside TRL's, until they are logged.

    Attributes:
        timers: How long the weights took, in training and in evaluations.
    """

    def __init__(self) -> None:
        self.timers = {"train": DeviceTimer(), "eval": DeviceTimer()}
        self._pairs: dict[str, list[int]] = {"train": [], "eval": []}
        self._losses: list[np.ndarray] = []

    def start_evaluation(self, collected: dict[str, list[float]]) -> None:
        """Forgets a prediction, or an evaluation that was broken off.

        Args:
            collected: TRL's numbers of evaluations so far.
        """
        for kept in (self._losses, self._pairs["eval"], collected):
            kept.clear()

    def evaluation_loss(self) -> float | None:
        """The mean loss over pairs of what was evaluated; None if nothing was."""
        return float(np.concatenate(self._losses).mean()) if self._losses else None

    def add(
        self, mode: str, collected: dict[str, list[float]], table: PairTable, summaries: Tensor, pairs: int = 1
    ) -> None:
        """Adds a micro-batch: each number's mean over the pairs of all processes.

        Args:
            mode: `"train"` or `"eval"`.
            collected: TRL's numbers of the mode, by name, one for each micro-batch. Where TRL has added one of the
                same name for this micro-batch, ours takes its place.
            table: The names, and this process's numbers.
            summaries: Of every process that counts [`PairTable.summary`], `(P, 3, K + 1)` on the host.
            pairs: What the micro-batch counts among others, 1 where each has the same share.

        Raises:
            ValueError: The weighting has called a number as one of TRL's or of ours.
        """
        self._refuse_names(mode, collected, table)
        sums, counts, largest = summaries[:, 0].sum(0), summaries[:, 1].sum(0), summaries[:, 2].amax(0)
        means, most = (sums / counts).tolist(), largest.tolist()
        for place, name in enumerate(table.names):
            if name in collected and len(collected[name]) > len(self._pairs[mode]):
                collected[name][-1] = means[place]  # in TRL's place
            else:
                collected[name].append((most if name.startswith(_LARGEST) else means)[place])
        self._pairs[mode].append(pairs)

    def add_evaluated(self, collected: dict[str, list[float]], table: PairTable, values: Tensor) -> None:
        """Adds a micro-batch of an evaluation, which counts by its pairs; else as [`add`].

        Args:
            collected: See there.
            table: The names.
            values: The values of all processes' pairs that count, `(N, K + 1)` on the host.
        """
        self.add("eval", collected, table, table_summary(values)[None], len(values))
        self._losses.append(values[:, -1].numpy())

    def average(self, mode: str, collected: dict[str, list[float]]) -> None:
        """Brings TRL's numbers of the mode to what is logged: one mean each, and the weights' times.

        Waits for the device, off which the times are read.
        """
        pairs = self._pairs[mode]
        collected.update(averaged_over_pairs(collected, pairs))
        pairs.clear()
        times = self.timers[mode].take()
        if times and "transport/iterations" in collected:
            collected[_TIMES].extend(times)

    def _refuse_names(self, mode: str, collected: Mapping[str, list[float]], table: PairTable) -> None:
        trls = [name for name in table.own if len(collected.get(name, ())) > len(self._pairs[mode])]
        taken = [*trls, *(name for name in table.own if table.names.count(name) > 1 or name in ("loss", _TIMES))]
        if taken:
            raise ValueError(
                f"The weighting logs a number as {taken[0]!r}, which the trainer logs itself. Give it another name."
            )


def pair_table(columns: Mapping[str, Tensor], own: Mapping[str, float | Tensor], loss: Tensor) -> PairTable:
    """Brings numbers of pairs, of the weighting and the loss into one table.

    Args:
        columns: By name, a number of each pair, `(B,)`.
        own: The weighting's own numbers of the micro-batch.
        loss: The micro-batch's mean loss.
    """
    pairs = next(iter(columns.values())).size(0)
    scalars = [
        value.detach() if isinstance(value, Tensor) else torch.full((), value, device=loss.device)
        for value in (*own.values(), loss)
    ]
    numbers = [*columns.values(), *(scalar.reshape(1).expand(pairs) for scalar in scalars)]
    values = torch.stack([number.to(loss.device, torch.float32, non_blocking=True) for number in numbers], 1)
    return PairTable([*columns, *own], list(own), values)


def table_summary(values: Tensor) -> Tensor:
    """Of each column of `(B, K)` the sum of what is not NaN, how much that is, and the largest, `(3, K)` float64."""
    values = values.double()
    return torch.stack([values.nansum(0), (~values.isnan()).sum(0).double(), values.amax(0)])


def pair_columns(scored: Scored, beta: float) -> dict[str, Tensor]:
    """What is logged of each pair beside TRL's metrics, `(B,)` each.

    Args:
        scored: The micro-batch.
        beta: The loss's.
    """
    log_ratios = scored.policy_logps.detach() - scored.reference_logps
    return {
        **weight_metrics(scored.weights, scored.mask),
        **reward_metrics(beta * log_ratios.sum(1), "_unweighted"),
        "pairs/similarity": pair_similarity(scored.batch.hidden_states, scored.mask),
    }


def trl_columns(logps: Tensor, reference_sums: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's own numbers of each pair, `(B,)` each, for a micro-batch that TRL counts repeated pairs of.

    Args:
        logps: `(2B,)`, the policy's summed log-probabilities, as they enter the loss.
        reference_sums: `(2B,)`, the reference's.
        beta: The loss's.
    """
    named = zip(("logps/chosen", "logps/rejected"), logps.chunk(2), strict=True)
    return {**reward_metrics(beta * (logps - reference_sums)), **dict(named)}
