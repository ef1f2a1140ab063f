"""Batches of pairs for weightings, without a model."""

import torch

from otpo.weighting import PairBatch


def make_batch(lengths: list[int], width: int = 9, step: int = 0, seed: int = 0) -> PairBatch:
    """Rows of the given numbers of tokens, after a prompt of one to three positions."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, count in enumerate(lengths):
        start = 1 + row % 3 if count + 3 <= width else 0
        mask[row, start : start + count] = True
    ids = torch.randint(0, 1000, mask.shape, generator=generator)
    states = torch.randn(*mask.shape, 5, generator=generator)
    return PairBatch(mask, ids, -torch.rand(mask.shape, generator=generator), states, step)
