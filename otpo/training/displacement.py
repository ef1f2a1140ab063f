"""Whether training made the chosen answers less likely, which DPO's loss allows where the rejected ones lose more.

The log's `logps/chosen` alone can't tell: from batch to batch it moves with the answers' lengths. A reward is a change
of the same answers, so a mean of rewards can.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Any, NamedTuple

NOTABLE = 1.0
"""Nats of an answer that are a fall worth a line."""
_PART = 0.25  # of the logs, from the end on
REMEDY = (
    "leave out pairs that are nearly the same, add sft to `loss_type`, raise `beta`, lower `learning_rate`, or weigh "
    "what differs (`weighting=contrast`)"
)


class Fall(NamedTuple):
    """How much less likely the chosen answers are than to the reference, by the last quarter of a run's logs.

    Attributes:
        nats: Mean fall of an answer's log-probability, each token counted once.
        before: The reference's mean `logps/chosen`, tokens counted by their weights.
        after: The policy's, of the same answers.
        similarity: Mean `pairs/similarity`; None where that is not logged.
        logs: How many logs these are of.
    """

    nats: float
    before: float
    after: float
    similarity: float | None
    logs: int

    def describe(self) -> str:
        """A sentence with the cause and the remedy."""
        told = f"{self.nats:.3g} nats an answer, by the last {self.logs} log(s), against the reference"
        if self.after < self.before:
            told = f"logps/chosen fell from {self.before:.4g} to {self.after:.4g}: {told}"
        else:
            told = f"chosen answers fell, though logps/chosen, which weighs their tokens, did not: {told}"
        alike = "" if self.similarity is None else f" (pairs/similarity {self.similarity:.3g})"
        return f"{told}. Pairs whose answers are alike{alike} push the chosen ones down. To stop it, {REMEDY}."


def find_fall(logs: Sequence[Mapping[str, Any]], beta: float) -> Fall | None:
    """How far the chosen answers fell; None where they did not, by less than [`NOTABLE`], or nothing tells.

    Args:
        logs: A trainer's `state.log_history`.
        beta: The loss's, by which rewards are multiplied.
    """
    names = ("rewards/chosen_unweighted", "rewards/chosen", "logps/chosen")
    told = [entry for entry in logs if all(name in entry for name in names)]
    last = told[-ceil(_PART * len(told)) :] if told else []
    if not last or beta <= 0:
        return None
    unweighted, weighted, after = (fmean(float(entry[name]) for entry in last) for name in names)
    nats = -unweighted / beta
    if not nats >= NOTABLE:
        return None
    alike = [float(entry["pairs/similarity"]) for entry in last if "pairs/similarity" in entry]
    return Fall(nats, after - weighted / beta, after, fmean(alike) if alike else None, len(last))
