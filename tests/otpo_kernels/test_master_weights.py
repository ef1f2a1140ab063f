"""The kernel of AdamW on float32 masters gives the plain torch's numbers."""

import math

import pytest
import torch

from otpo_kernels.master_weights import join_master, step_numbers, update_halves, update_whole
from otpo_kernels.master_weights_kernels import update

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BETAS, EPS = (0.9, 0.95), 1e-8


def numbers(step: int, scale: float = 1.0, found: float = 0.0, device: str = "cpu") -> torch.Tensor:
    told = torch.tensor(scale), torch.tensor(found)
    return step_numbers(torch.tensor([float(step)]), 3e-3, BETAS, 0.1, *told)[0].to(device)


def tensors(shape, kind, grad_kind, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    weight = draw().to(kind)
    remainder = torch.randint(-32768, 32768, shape, generator=generator).to(torch.int16)
    made = [weight, (draw() * 10 ** (3 * draw())).to(grad_kind), draw() * 0.1, draw().square()]
    return [remainder.to(device), *(each.to(device) for each in made)]


def plain(remainder, weight, grad, first, second, row):
    if weight.dtype == torch.bfloat16:
        update_halves(weight.view(torch.int16), remainder, grad, first, second, row, BETAS, EPS)
    else:
        update_whole(weight, grad, first, second, row, BETAS, EPS)


def fast(remainder, weight, grad, first, second, row):
    update(weight, remainder if weight.dtype == torch.bfloat16 else None, grad, first, second, row, BETAS, EPS)


def master(remainder, weight):
    return join_master(weight.view(torch.int16), remainder) if weight.dtype == torch.bfloat16 else weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (63,), (64,), (5, 33), (2, 3, 64)], ids=str)
def test_steps_are_those_of_plain_torch(shape, kind, grad_kind, device):
    mine, theirs = (tensors(shape, kind, grad_kind, device=device) for _ in range(2))
    for step, scale in enumerate((1.0, 2.5, 1.0), 1):
        row = numbers(step, scale, device=device)
        fast(*mine, row)
        plain(*theirs, row)
        grad = tensors(shape, kind, grad_kind, step, device)[2]
        mine[2], theirs[2] = grad, grad.clone()
    torch.testing.assert_close(master(*mine[:2]), master(*theirs[:2]), rtol=1e-5, atol=1e-7)
    for one, other in zip(mine[3:], theirs[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_a_step_that_is_left_out_changes_nothing(kind, device):
    mine, before = (tensors((7, 31), kind, torch.float32, device=device) for _ in range(2))
    mine[2][0, 0] = math.inf
    fast(*mine, numbers(1, found=1.0, device=device))
    for place in (0, 1, 3, 4):
        assert torch.equal(mine[place], before[place])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_stays_so(kind, device):
    for value in (math.nan, math.inf, -math.inf):
        mine, theirs = (tensors((4, 20), kind, torch.float32, device=device) for _ in range(2))
        for each in (mine, theirs):
            each[2][1, 3] = value
            each[1][2, 5] = math.nan
        row = numbers(1, device=device)
        fast(*mine, row)
        plain(*theirs, row)
        found, expected = master(*mine[:2]), master(*theirs[:2])
        assert found[1, 3].isnan() and found[2, 5].isnan()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
