"""Whether a model computes the same in rows without padding, found by trying it on a few tokens.

Models differ in what they do with masks, positions and lengths, and one that ignores them lets rows see each other.
No list of models tells that as surely as their hidden states do.

Shapes: R rows, L positions, N tokens that are run, D hidden size.
"""

import torch
from torch import Tensor

from .plan import RowPlan

# Half precision makes 0.01 of the states' norm, rows that see each other or wrong positions 0.3 and more.
_LARGEST_GAP = 0.1


def trial_batch(vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Two pairs of a few made-up tokens, padded, `[4, 20]`: long and short prompts, answers that begin alike."""
    generator = torch.Generator().manual_seed(0)
    lengths, prompts = torch.tensor([17, 7, 20, 9]), torch.tensor([9, 4, 9, 4])
    places = torch.arange(int(lengths.max()))
    mask = places < lengths[:, None]
    ids = torch.randint(0, vocab_size, mask.shape, generator=generator)
    ids[2:, :11] = torch.where(places[:11] < prompts[2:, None] + 2, ids[:2, :11], ids[2:, :11])
    completion = mask & (places >= prompts[:, None])
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "completion_mask": completion.long()}
    return {name: value.to(device) for name, value in batch.items()}


def state_gap(padded: Tensor, planned: Tensor, plan: RowPlan) -> Tensor:
    """By how much of its norm the hidden state at a scored position differs, the median over positions, a scalar.

    A router that chooses other experts at a few tokens, for rounding, moves no median.

    Args:
        padded: `[R, L, D]`, of the padded batch.
        planned: `[1, N, D]`, of the same batch in one row.
        plan: That row.
    """
    expected = padded[:, :-1].flatten(0, 1).index_select(0, plan.slots).float()
    found = planned[0].index_select(0, plan.scored).float()
    gaps = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return gaps.nan_to_num(torch.inf).median()


def is_same_state(gap: float) -> bool:
    """Whether a [`state_gap`] can be that of the same computation."""
    return gap <= _LARGEST_GAP
