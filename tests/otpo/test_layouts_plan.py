"""Plans of rows without padding against a double loop over rows and positions."""

from itertools import pairwise

import pytest
import torch
from helpers import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from otpo.layouts.lengths_attention import row_mask
from otpo.layouts.plan import plan_rows


def written_plan(batch, share):
    """The plan of a batch, position by position: `{(row, place): index}`, and ids, positions, pairs, branches."""
    rows, width = batch["input_ids"].shape
    pairs = rows // 2
    tokens = [[place for place in range(width) if batch["attention_mask"][row, place]] for row in range(rows)]
    ids = [[int(batch["input_ids"][row, place]) for place in tokens[row]] for row in range(rows)]
    shared = []
    for pair in range(pairs):
        count = 0
        while (
            share
            and count < min(len(ids[pair]), len(ids[pairs + pair]))
            and ids[pair][count] == ids[pairs + pair][count]
        ):
            count += 1
        shared.append(count)
    run, where = [], {}
    for pair in range(pairs):
        for place in range(shared[pair]):
            for row in (pair, pairs + pair):
                where[row, tokens[row][place]] = len(run)
            run.append((ids[pair][place], place, pair, 0))
    for pair in range(pairs):
        for branch, row in ((1, pair), (2, pairs + pair)):
            for place in range(shared[pair], len(tokens[row])):
                where[row, tokens[row][place]] = len(run)
                run.append((ids[row][place], place, pair, branch))
    return run, where, shared


@pytest.mark.parametrize("share", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_plans_are_those_of_a_loop(share, data):
    pairs = data.draw(st.integers(1, 4))
    lengths = [data.draw(st.lists(st.integers(low, 9), min_size=pairs, max_size=pairs)) for low in (0, 1, 1)]
    batch = random_batch(
        *lengths,
        seed=data.draw(st.integers(0, 9)),
        side=data.draw(st.sampled_from(["left", "right"])),
        vocab=data.draw(st.sampled_from([2, 50])),
    )
    plan = plan_rows(**batch, share=share)
    run, where, shared = written_plan(batch, share)
    ids, positions, of_pairs, branches = (list(part) for part in zip(*run, strict=True))
    assert plan.ids[0].tolist() == ids and plan.positions[0].tolist() == positions
    assert plan.pairs.tolist() == of_pairs and plan.branches.tolist() == branches
    assert plan.shared_tokens == sum(shared)

    # Each scored position of the padded batch is asked once, of the token before it.
    rows, width = batch["input_ids"].shape
    asked = []
    for row in range(rows):
        for place in range(1, width):
            if batch["completion_mask"][row, place] and batch["attention_mask"][row, place - 1]:
                asked.append(
                    (where[row, place - 1], int(batch["input_ids"][row, place]), row * (width - 1) + place - 1)
                )
    assert list(zip(plan.scored.tolist(), plan.targets.tolist(), plan.slots.tolist(), strict=True)) == asked

    # Lengths and masks tell the same: who sees whom.
    sees = row_mask(plan.pairs, plan.branches)
    for row in range(rows):
        places = [place for place in range(width) if batch["attention_mask"][row, place]]
        for number, place in enumerate(places):
            seen = sees[where[row, place]].nonzero().flatten().tolist()
            assert seen == sorted(where[row, before] for before in places[: number + 1])
    ends = plan.segment_ends.tolist()
    parts = [end - start for start, end in pairwise(ends)]
    assert parts[:pairs] == shared and sum(parts) == len(run)
    assert (plan.branch_ends.diff() == torch.tensor(parts[pairs:]).view(-1, 2).sum(1)).all()
    assert plan.shared_ends.diff().tolist() == shared
    assert plan.longest[0] >= max(parts) and plan.longest[1] >= int(plan.branch_ends.diff().max())
    assert plan.copies.tolist() == [[2 if branch == 0 else 1 for branch in branches]]


def test_copies_count_each_token_of_the_padded_batch_once():
    batch = random_batch([3, 5], [2, 7], [4, 1])
    for share in (True, False):
        assert plan_rows(**batch, share=share).copies.sum() == batch["attention_mask"].sum()
