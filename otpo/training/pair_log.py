"""Numbers of pairs on their way to the log, in training and in evaluations apart.

TRL averages its numbers over micro-batches. In training each micro-batch has the same share in a step's loss, so
that is right there, unless a number of tokens makes batches; an evaluation is of pairs, and its last batch is smaller.

Shapes: B pairs of this process's micro-batch.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from .metrics import averaged_over_pairs, reward_metrics, weight_metrics
from .scoring import Scored
from .timing import DeviceTimer

_TIMES = "transport/ms"
_LARGEST = "transport/"  # of these numbers the largest of a micro-batch is logged, of all others the mean


class PairLog:
    """Collects numbers of each micro-batch beside TRL's, until they are logged.

    Attributes:
        timers: How long the weights took, in training and in evaluations.

    Args:
        by_pairs: Whether training's numbers are means over pairs too, as its loss is under `tokens_per_batch`.
    """

    def __init__(self, by_pairs: bool = False) -> None:
        self._by_pairs = {"train": by_pairs, "eval": True}
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
        self,
        mode: str,
        collected: dict[str, list[float]],
        columns: Mapping[str, Tensor],
        own: Mapping[str, float | Tensor],
        loss: Tensor,
        gather: Callable[[Tensor], Tensor],
        kept: int | None,
    ) -> None:
        """Adds a micro-batch: each number's mean over the pairs of all processes, in one exchange.

        Args:
            mode: `"train"` or `"eval"`.
            collected: TRL's numbers of the mode, by name, one for each micro-batch. Where TRL has added one of the
                same name for this micro-batch, ours takes its place.
            columns: By name, a number of each pair, `(B,)`.
            own: The weighting's own numbers of the micro-batch.
            loss: The micro-batch's mean loss.
            gather: Joins tensors of all processes along their first dimension.
            kept: Of all processes' pairs, how many count; None for all of them.

        Raises:
            ValueError: The weighting has called a number as one of TRL's or of ours.
        """
        self._refuse_names(mode, collected, own, columns)
        pairs = next(iter(columns.values())).size(0)
        columns = dict(columns) | {
            name: torch.as_tensor(value).reshape(1).expand(pairs) for name, value in own.items()
        }

        # One table of pairs by numbers, the loss last, crosses the processes and then to the host.
        numbers = [*columns.values(), loss.detach().reshape(1).expand(pairs)]
        table = gather(torch.stack([number.to(loss.device, torch.float32) for number in numbers], 1)).cpu()[:kept]

        of_columns = table[:, : len(columns)]
        means, largest = of_columns.double().nanmean(0).tolist(), of_columns.amax(0).tolist()
        for name, mean, most in zip(columns, means, largest, strict=True):
            if name in collected and len(collected[name]) > len(self._pairs[mode]):
                collected[name][-1] = mean  # in TRL's place
            else:
                collected[name].append(most if name.startswith(_LARGEST) else mean)
        self._pairs[mode].append(len(table))
        if mode == "eval":
            self._losses.append(table[:, -1].numpy())

    def average(self, mode: str, collected: dict[str, list[float]]) -> None:
        """Brings TRL's numbers of the mode to what is logged: one mean each, and the weights' times.

        Waits for the device, off which the times are read.
        """
        pairs = self._pairs[mode]
        collected.update(averaged_over_pairs(collected, pairs if self._by_pairs[mode] else [1] * len(pairs)))
        pairs.clear()
        times = self.timers[mode].take()
        if times and "transport/iterations" in collected:
            collected[_TIMES].extend(times)

    def _refuse_names(
        self, mode: str, collected: Mapping[str, list[float]], own: Mapping[str, object], columns: Mapping[str, object]
    ) -> None:
        trls = [name for name in own if len(collected.get(name, ())) > len(self._pairs[mode])]
        taken = [*trls, *(name for name in own if name in columns or name in ("loss", _TIMES))]
        if taken:
            raise ValueError(
                f"The weighting logs a number as {taken[0]!r}, which the trainer logs itself. Give it another name."
            )


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
