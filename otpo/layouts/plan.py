"""Where each token of a micro-batch stands in one row without padding, as a pure function of the batch's masks.

Two rows of a pair that begin with the same tokens have the same hidden states there, so these tokens can be computed
once. What a position predicts is looked up by an index, so one position may be scored for both rows.

Shapes: B pairs, R = 2B rows (chosen responses first), L positions of a padded batch, T = L - 1 scored positions,
N tokens that are run, S scores.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# Longest lengths are rounded up: kernels take them as bounds, and compiled code meets fewer different numbers.
_LENGTHS_STEP = 128


@dataclass(frozen=True)
class RowPlan:
    """One row of tokens, and where its scores belong in the padded batch.

    The row begins with what the pairs' two rows share, pair by pair; behind it follow, pair by pair, what only the
    chosen and what only the rejected row has. Without sharing, the first part is empty.

    Attributes:
        ids: `[1, N]` int64, the tokens.
        positions: `[1, N]` int64, each token's position in its own row.
        pairs: `[N]` int64, the pair of each token.
        branches: `[N]` int64, 0 for tokens that both rows share, 1 for chosen and 2 for rejected ones.
        scored: `[S]` int64, the index of the token that predicts, within N; the same one twice where both rows ask it.
        targets: `[S]` int64, the token that is predicted.
        slots: `[S]` int64, where the score belongs in the flattened `[R, T]`.
        segment_ends: `[3B + 1]` int32, cumulative lengths: B shared parts, then chosen and rejected parts in turn.
        branch_ends: `[B + 1]` int32, cumulative lengths of both parts together, counted from the first of them.
        shared_ends: `[B + 1]` int32, cumulative lengths of the shared parts.
        shared_tokens: How many tokens all shared parts have.
        longest: At least the longest of the segments, of the branches and of the shared parts.
        shape: `(R, T)`.
    """

    ids: Tensor
    positions: Tensor
    pairs: Tensor
    branches: Tensor
    scored: Tensor
    targets: Tensor
    slots: Tensor
    segment_ends: Tensor
    branch_ends: Tensor
    shared_ends: Tensor
    shared_tokens: int
    longest: tuple[int, int, int]
    shape: tuple[int, int]

    @property
    def copies(self) -> Tensor:
        """In how many rows each token stands, `[1, N]` int64: what a mean over the rows' tokens weighs it by."""
        return (2 - self.branches.clamp(max=1)).unsqueeze(0)

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """The plan with its tensors on a device, as loaders move what they yield."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The plan with its tensors in pinned memory, as loaders call it."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def plan_rows(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *, share: bool) -> RowPlan:
    """The plan of a padded micro-batch. Its tensors are the batch's device's; on a GPU the call waits for the device.

    Args:
        input_ids: `[R, L]`, padded on either side.
        attention_mask: `[R, L]`, 1 at tokens; each row's tokens stand together.
        completion_mask: `[R, L]`, 1 at the tokens that are scored.
        share: Whether tokens that both rows of a pair begin with are run once.
    """
    is_token, is_scored = attention_mask.bool(), completion_mask.bool()
    rows, width = input_ids.shape
    pairs = rows // 2
    places = torch.arange(width, device=input_ids.device)
    lengths = is_token.sum(1)
    first = torch.where(lengths > 0, is_token.int().argmax(1), 0)

    # How many tokens the two rows of each pair begin with in common; padding before them is skipped.
    shared = torch.zeros(pairs, dtype=torch.long, device=input_ids.device)
    if share and pairs:
        aligned = (first[:, None] + places).clamp(max=width - 1)
        tokens = input_ids.gather(1, aligned).masked_fill(places >= lengths[:, None], -1)
        chosen, rejected = tokens.chunk(2)
        shared = ((chosen == rejected) & (chosen >= 0)).long().cumprod(1).sum(1)
    of_rows = shared.repeat(2)

    # The row in its order: shared parts, then each pair's branches, side by side.
    local = places - first[:, None]  # position of each place within its row
    row_numbers = torch.arange(rows, device=input_ids.device)[:, None].expand(rows, width)
    in_shared = is_token & (local < of_rows[:, None]) & (row_numbers < pairs)
    in_branch = is_token & (local >= of_rows[:, None])
    pair_of_row = row_numbers % max(pairs, 1)
    order = pair_of_row * 2 + row_numbers // max(pairs, 1)
    shared_rows, shared_places = in_shared.nonzero(as_tuple=True)
    branch_rows, branch_places = in_branch.nonzero(as_tuple=True)
    turn = torch.argsort(order[branch_rows, branch_places], stable=True)
    run_rows = torch.cat([shared_rows, branch_rows[turn]])
    run_places = torch.cat([shared_places, branch_places[turn]])
    count_shared = len(shared_rows)

    # Where each token of the padded batch is run: what a rejected row shares, in its chosen row's place.
    index = torch.zeros(rows, width, dtype=torch.long, device=input_ids.device)
    index[run_rows, run_places] = torch.arange(len(run_rows), device=input_ids.device)
    if count_shared:
        starts = shared.cumsum(0) - shared
        index = torch.where(is_token & (local < of_rows[:, None]), starts.repeat(2)[:, None] + local, index)

    # Scores: the token at `place` is predicted by the one before it, which may be padding only in a row's first place.
    asked = is_scored[:, 1:] & is_token[:, :-1] & is_token[:, 1:]
    asked_rows, asked_places = asked.nonzero(as_tuple=True)
    branches = torch.where(
        torch.arange(len(run_rows), device=input_ids.device) < count_shared, 0, 1 + run_rows // max(pairs, 1)
    )
    own = lengths - of_rows
    parts = torch.stack(own.chunk(2), 1)  # [B, 2]
    return RowPlan(
        ids=input_ids[run_rows, run_places][None],
        positions=local[run_rows, run_places][None],
        pairs=run_rows % max(pairs, 1),
        branches=branches,
        scored=index[asked_rows, asked_places],
        targets=input_ids[asked_rows, asked_places + 1],
        slots=asked_rows * (width - 1) + asked_places,
        segment_ends=_ends(torch.cat([shared, parts.flatten()])),
        branch_ends=_ends(parts.sum(1)),
        shared_ends=_ends(shared),
        shared_tokens=count_shared,
        longest=(_longest(torch.cat([shared, own])), _longest(parts.sum(1)), _longest(shared)),
        shape=(rows, width - 1),
    )


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _longest(lengths: Tensor) -> int:
    longest = int(lengths.max()) if len(lengths) else 0
    return -(-longest // _LENGTHS_STEP) * _LENGTHS_STEP
