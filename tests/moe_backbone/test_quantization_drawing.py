"""Draws of documents: shares that are filled where they can be, the budget, the seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backbone.quantization.drawing import DRAWS, draw, find_unfilled

COMMON, RARE = [9, 9, 0], [1, 1, 16]
TOKENS = torch.full((40,), 9)


def rows(*documents):
    """One layer's rows `(N, 1, E)`."""
    return torch.tensor(documents)[:, None].int()


def test_rare_experts_are_drawn_for():
    """39 documents for two experts, and one, somewhere, for the third."""
    for place in (0, 17, 39):
        found = rows(*[RARE if number == place else COMMON for number in range(40)])
        drawn = draw("expert_aware", found, TOKENS, share=10, budget=90, seed=0)
        assert drawn[0] == place and len(drawn) == 10 == len(set(drawn))
        assert not find_unfilled(drawn, found, (4,), 10)
    even = [draw("uniform", found, TOKENS, share=10, budget=90, seed=seed) for seed in range(20)]
    with_it = sum(39 in drawn for drawn in even)
    assert all(len(drawn) == 10 for drawn in even) and 0 < with_it < 15
    short = find_unfilled(next(drawn for drawn in even if 39 not in drawn), found, (4,), 10)
    assert [tuple(entry) for entry in short] == [(4, 2, 0, 16)]


def test_the_cheaper_of_two_documents_is_drawn():
    found = rows([5, 0], [5, 0], [0, 5])
    drawn = draw("expert_aware", found, torch.tensor([50, 10, 10]), share=5, budget=20, seed=0)
    assert sorted(drawn) == [1, 2]


def test_what_no_document_brings_is_told_and_does_not_keep_others_from_it():
    found = rows([4, 0, 1], [4, 0, 1])
    drawn = draw("expert_aware", found, torch.tensor([5, 5]), share=3, budget=100, seed=0)
    assert sorted(drawn) == [0, 1]
    assert [tuple(entry) for entry in find_unfilled(drawn, found, (0,), 3)] == [(0, 1, 0, 0), (0, 2, 2, 2)]


@pytest.mark.parametrize("kind", DRAWS)
def test_one_document_is_drawn_where_none_fits(kind):
    assert len(draw(kind, rows([1, 0], [0, 1]), torch.tensor([8, 9]), share=1, budget=3, seed=0)) == 1
    assert draw(kind, rows([0, 0]), torch.tensor([3]), share=1, budget=1, seed=0) == [0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_budget_seed_and_shares_hold_for_any_rows(data):
    documents, layers, experts = (data.draw(st.integers(1, most)) for most in (12, 3, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    found = torch.randint(0, 6, (documents, layers, experts), generator=generator).int()
    tokens = torch.randint(1, 9, (documents,), generator=generator)
    share, budget, seed = (data.draw(st.integers(1, most)) for most in (12, 60, 5))
    for kind in DRAWS:
        drawn = draw(kind, found, tokens, share, budget, seed)
        assert drawn == draw(kind, found.clone(), tokens, share, budget, seed)
        assert len(drawn) == len(set(drawn)) >= 1
        assert tokens[drawn].sum() <= budget or len(drawn) == 1
        # Nothing that still fits is left behind.
        left = [int(count) for number, count in enumerate(tokens) if number not in drawn]
        assert all(count > budget - int(tokens[drawn].sum()) for count in left)
    everything = draw("expert_aware", found, tokens, share, int(tokens.sum()), seed)
    short = find_unfilled(everything, found, tuple(range(layers)), share)
    assert {(it.layer, it.expert) for it in short} == {tuple(it) for it in (found.sum(0) < share).nonzero().tolist()}
    assert all(it.rows == it.candidates for it in short)


def test_the_seed_decides_between_equals():
    found = rows(*[[3, 3]] * 30)
    drawn = {tuple(draw("expert_aware", found, torch.full((30,), 4), 3, 4, seed)) for seed in range(12)}
    assert len(drawn) > 4


def test_what_is_no_draw_is_refused():
    with pytest.raises(ValueError, match=r"calibration=best.*expert_aware, uniform"):
        draw("best", rows([1]), torch.tensor([1]), 1, 1, 0)
    with pytest.raises(ValueError, match="no documents"):
        draw("uniform", torch.zeros(0, 1, 1), torch.zeros(0), 1, 1, 0)
