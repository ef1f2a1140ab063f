"""Batches of pairs for weightings, without a model."""

from typing import Any

import torch
from datasets import Dataset

from otpo.weighting import PairBatch, TokenWeights


def make_batch(lengths: list[int], width: int = 9, step: int = 0, seed: int = 0) -> PairBatch:
    """Rows of the given numbers of tokens, after a prompt of one to three positions, with all that there may be."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, count in enumerate(lengths):
        start = 1 + row % 3 if count + 3 <= width else 0
        mask[row, start : start + count] = True
    ids = torch.randint(0, 1000, mask.shape, generator=generator)
    states = torch.randn(*mask.shape, 5, generator=generator)
    logps, reference = (-torch.rand(mask.shape, generator=generator) for _ in range(2))
    unmatched = (torch.rand(mask.shape, generator=generator) < 0.4) & mask
    given = torch.rand(mask.shape, generator=generator) * mask
    values = {"unmatched": unmatched.float(), "given_weights": given}
    return PairBatch(mask, ids, logps, states, step, {}, reference, values)


def with_weights(pairs: Dataset) -> Dataset:
    """Pairs of conversations whose answers' second halves count six times as much as their first."""

    def add(row: dict[str, Any]) -> dict[str, Any]:
        sizes = {side: len(row[side][-1]["content"]) for side in ("chosen", "rejected")}
        return {f"{side}_weights": [[0, size // 2, 0.5], [size // 2, size, 3]] for side, size in sizes.items()}

    return pairs.map(add)


def values_of(answer: torch.Tensor | TokenWeights) -> torch.Tensor:
    """The weights of what a weighting returns."""
    return answer.values if isinstance(answer, TokenWeights) else answer
