"""The trip of a row where one process is enough to follow it; test_expert_parallel.py sends rows between two."""

import pytest
import torch

from moe_backbone.expert_parallel.exchange import ExpertGroup, run_by_expert, run_spread_experts


def scale_by_expert(rows, ends):
    """Stands for experts: the first one doubles its rows, the second one triples them, and so on."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).long()
    return rows * (2.0 + torch.arange(len(ends))).repeat_interleave(sizes)[:, None]


@pytest.mark.parametrize(
    "arrived", [[[2, 0, 1], [1, 3, 0]], [[0, 0, 0], [0, 2, 0]], [[0, 0, 0], [0, 0, 0]], [[2, 1, 3]]]
)
def test_rows_that_arrived_meet_their_expert_and_return_in_order(arrived):
    counts = torch.tensor(arrived, dtype=torch.int32)
    expert = torch.arange(3).repeat(len(arrived)).repeat_interleave(counts.flatten().long())
    x = torch.randn(len(expert), 4, requires_grad=True)
    y = run_by_expert(x, counts, scale_by_expert)
    y.sum().backward()
    assert torch.equal(y, x * (2.0 + expert)[:, None])
    assert torch.equal(x.grad, (2.0 + expert)[:, None].expand(-1, 4))


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_one_process_has_all_rows_already(tokens):
    index = torch.rand(tokens, 5).argsort(1)[:, :2]
    x, weights = torch.randn(tokens, 4, requires_grad=True), torch.rand(tokens, 2, requires_grad=True)
    got = run_spread_experts(
        x, index, weights, ExpertGroup(None, 1, 5), lambda rows, counts: run_by_expert(rows, counts, scale_by_expert)
    )
    want = (x[:, None] * ((2.0 + index) * weights)[:, :, None]).sum(1)
    torch.testing.assert_close(got, want)
    pull = torch.randn(tokens, 4)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weights), pull), torch.autograd.grad(want, (x, weights), pull), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
