"""Which documents calibrate: drawn evenly, or until each expert of each layer has seen its share of rows.

The even draw takes documents in a shuffled order until it has its budget of tokens. A router sends most tokens to a
few experts, so that it leaves rare ones with few rows or none. The expert-aware draw takes, again and again, the
document that brings most of what is still missing for a token of its length, where a row for a rare expert counts
more; what is left of the budget is drawn evenly. So both see equally much.

Compass-v3's report (arXiv 2509.09121) names calibration that is oversampled towards rarely used experts, and no more
of it: the greedy choice and its weights are ours. A row counts as one over the fourth root of the rows that all
documents bring to its expert. Weights of one over the rows themselves spend a tight budget on the rarest expert, and
equal ones leave it unseen (`benchmarks/quantization_draws.py` compares the draws).

Shapes: N documents, L layers with experts, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = ("expert_aware", "uniform")
RARITY = 0.25
"""How much more a row for a rare expert counts: the power of the rows that its expert gets of all documents."""


class Unfilled(NamedTuple):
    """An expert that has seen less than its share.

    Attributes:
        layer: Number of the layer.
        expert: Number of the expert.
        rows: That were drawn for it.
        candidates: Rows for it in all candidates.
    """

    layer: int
    expert: int
    rows: int
    candidates: int


def draw(kind: str, rows_NLE: Tensor, tokens_N: Tensor, share: int, budget: int, seed: int) -> list[int]:
    """The documents of a draw, by number, in the order in which they were drawn.

    Args:
        kind: One of [`DRAWS`].
        rows_NLE: Rows that each document brings to each expert, integers.
        tokens_N: Tokens of each document, at least 1.
        share: Rows that each expert is to see, at least 1. The even draw does not look at it.
        budget: Tokens to draw at most. One document is drawn in any case.
        seed: Of the order of documents, which also decides between equally good ones.

    Raises:
        ValueError: There are no documents, or no such draw.
    """
    if kind not in DRAWS:
        raise ValueError(f"`calibration={kind}`: set one of {', '.join(DRAWS)}.")
    if not len(tokens_N):
        raise ValueError("There are no documents to draw from.")
    order_N = torch.randperm(len(tokens_N), generator=torch.Generator().manual_seed(seed))
    tokens_N = tokens_N[order_N].long()
    drawn: list[int] = []
    if kind == "expert_aware":
        drawn = _fill_shares(rows_NLE[order_N].flatten(1), tokens_N, share, budget)
    drawn = _fill_up(drawn, tokens_N, budget)
    return order_N[torch.tensor(drawn)].tolist()


def _fill_shares(rows_NM: Tensor, tokens_N: Tensor, share: int, budget: int) -> list[int]:
    """The greedy choice over M cells, each an expert of a layer; ends when nothing is missing, or nothing fits."""
    rows_NM = rows_NM.float()
    totals_M = rows_NM.sum(0)
    reached = totals_M > 0  # no document brings anything to the others
    rows_NM, totals_M = rows_NM[:, reached], totals_M[reached]
    missing_M = torch.full_like(totals_M, share)
    drawn: list[int] = []
    left = budget
    free_N = torch.ones(len(tokens_N), dtype=torch.bool)
    while True:
        open_M = missing_M > 0
        fits_N = free_N & ((tokens_N <= left) if drawn else True)
        if not open_M.any() or not fits_N.any():
            return drawn
        gains_N = torch.minimum(rows_NM[:, open_M], missing_M[open_M]) @ totals_M[open_M] ** -RARITY
        gains_N = (gains_N / tokens_N).masked_fill(~fits_N, -1.0)
        best = int(gains_N.argmax())
        if gains_N[best] <= 0:
            return drawn
        drawn.append(best)
        free_N[best] = False
        left -= int(tokens_N[best])
        missing_M = (missing_M - rows_NM[best]).clamp(min=0)


def _fill_up(drawn: list[int], tokens_N: Tensor, budget: int) -> list[int]:
    """Adds documents in their order while they fit."""
    drawn, taken = list(drawn), set(drawn)
    left = budget - int(tokens_N[torch.tensor(drawn, dtype=torch.int64)].sum())
    for number, tokens in enumerate(tokens_N.tolist()):
        if number not in taken and (tokens <= left or not drawn):
            drawn.append(number)
            left -= tokens
    return drawn


def find_unfilled(drawn: list[int], rows_NLE: Tensor, layers: tuple[int, ...], share: int) -> list[Unfilled]:
    """The experts that have seen less than their share, by layer and expert.

    Args:
        drawn: Documents.
        rows_NLE: Rows that each of all documents brings to each expert.
        layers: Number of each layer.
        share: Rows that each expert is to see.
    """
    seen_LE, all_LE = rows_NLE[drawn].sum(0), rows_NLE.sum(0)
    short = (seen_LE < share).nonzero().tolist()
    return [
        Unfilled(layers[place], expert, int(seen_LE[place, expert]), int(all_LE[place, expert]))
        for place, expert in short
    ]
