"""The kernel of AdamW on float32 masters gives the plain torch's numbers."""

import math

import pytest
import torch
from operator_helpers import KERNEL_DEVICES

from otpo_kernels import master_weights, master_weights_kernels
from otpo_kernels.master_weights import join_master, step_numbers, update_all, update_halves, update_whole

BETAS, EPS = (0.9, 0.95), 1e-8


def numbers(step: int, scale: float = 1.0, found: float = 0.0, device: str = "cpu") -> torch.Tensor:
    told = torch.tensor(scale), torch.tensor(found)
    return step_numbers(torch.tensor([float(step)]), 3e-3, BETAS, 0.1, *told)[0].to(device)


def tensors(shape, kind, grad_kind, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    weight = draw().to(kind)
    remainder = torch.randint(-32768, 32768, shape, generator=generator).to(torch.int16)
    largest = torch.finfo(grad_kind).max
    grad = (draw() * 10 ** (3 * draw())).clamp(-largest, largest).to(grad_kind)
    made = [weight, grad, draw() * 0.1, draw().square()]
    return [remainder.to(device), *(each.to(device) for each in made)]


def plain(remainder, weight, grad, first, second, row):
    if weight.dtype == torch.bfloat16:
        update_halves(weight.view(torch.int16), remainder, grad, first, second, row, BETAS, EPS)
    else:
        update_whole(weight, grad, first, second, row, BETAS, EPS)


def fast(remainder, weight, grad, first, second, row):
    all_fast([(remainder, weight, grad, first, second)], row[None])


def all_fast(many, rows):
    """A step of [remainder, weight, grad, first moment, second moment] of each weight."""
    remainders, weights, *others = zip(*many, strict=True)
    halves = [r if w.dtype == torch.bfloat16 else None for r, w in zip(remainders, weights, strict=True)]
    update_all(weights, halves, *others, rows, BETAS, EPS)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """How many weights the kernel had in each of its launches, on the CPU too."""
    found = []
    launch = master_weights_kernels.update_all

    def counted(columns, *rest):
        found.append(len(columns[0]))
        launch(columns, *rest)

    monkeypatch.setattr(master_weights, "_runs_in_triton", lambda tensor: True)
    monkeypatch.setattr(master_weights_kernels, "update_all", counted)
    return found


def assert_same(mine, theirs, atol=1e-7):
    """`atol` is of what differences remain in: masters and, beside the first moment's 0.1, that moment."""
    torch.testing.assert_close(master(*mine[:2]), master(*theirs[:2]), rtol=1e-5, atol=atol)
    torch.testing.assert_close(mine[3], theirs[3], rtol=1e-5, atol=atol)
    torch.testing.assert_close(mine[4], theirs[4], rtol=1e-5, atol=1e-30)


def master(remainder, weight):
    return join_master(weight.view(torch.int16), remainder) if weight.dtype == torch.bfloat16 else weight


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("grad_kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (63,), (64,), (5, 33), (2, 3, 64)], ids=str)
def test_steps_are_those_of_plain_torch(shape, kind, grad_kind, device, launches):
    mine, theirs = (tensors(shape, kind, grad_kind, device=device) for _ in range(2))
    for step, scale in enumerate((1.0, 2.5, 1.0), 1):
        row = numbers(step, scale, device=device)
        fast(*mine, row)
        plain(*theirs, row)
        grad = tensors(shape, kind, grad_kind, step, device)[2]
        mine[2], theirs[2] = grad, grad.clone()
    assert_same(mine, theirs)
    assert launches == [1, 1, 1]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_a_step_that_is_left_out_changes_nothing(kind, device):
    mine, before = (tensors((7, 31), kind, torch.float32, device=device) for _ in range(2))
    mine[2][0, 0] = math.inf
    fast(*mine, numbers(1, found=1.0, device=device))
    for place in (0, 1, 3, 4):
        assert torch.equal(mine[place], before[place])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
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


SIZES = [0, 1, 63, 0, 64, 257, 3, 256, 1000, 0]  # a chunk of the kernel has 256 on the CPU
KINDS = [torch.bfloat16, torch.float32]


def off_by_one(tensor):
    """The same numbers at an address that no vector can be loaded from."""
    return torch.cat([tensor.new_zeros(1), tensor])[1:]


def rows_of(steps, found=0.0, device="cpu"):
    told = torch.tensor(2.0, device=device), torch.tensor(found, device=device)
    return step_numbers(torch.tensor(steps, device=device), 3e-3, BETAS, 0.1, *told)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_one_launch_takes_all_weights_of_the_same_types(device, launches):
    pairs = [(kind, grad_kind) for kind in KINDS for grad_kind in (*KINDS, torch.float16)]
    wanted = [(size, *pairs[(place + turn) % 6]) for turn in range(6) for place, size in enumerate(SIZES)]
    mine, theirs = ([tensors((n,), *kinds, n, device) for n, *kinds in wanted] for _ in range(2))
    for place, each in enumerate(mine):
        if place % 3 == 0:  # each of the five in turn, or all of them
            each[:] = [off_by_one(one) if place % 18 in (3 * which, 15) else one for which, one in enumerate(each)]
    rows = rows_of([1.0 + place % 7 for place in range(len(wanted))], device=device)
    all_fast(mine, rows)
    for one, other, row in zip(mine, theirs, rows, strict=True):
        plain(*other, row)
        assert_same(one, other)
    assert sorted(launches) == [len(SIZES)] * 6


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_nothing_beside_a_weight_is_written(device):
    whole = [tensors((3000,), *kinds, device=device) for kinds in ((torch.bfloat16, torch.float32), KINDS[1:] * 2)]
    before = [[one.clone() for one in each] for each in whole]
    for low, high in ((1, 2), (8, 8 + 64), (129, 1500), (1504, 2999)):
        all_fast([[one[low:high] for one in each] for each in whole], rows_of([1.0, 2.0], device=device))
        for each, old in zip(whole, before, strict=True):
            for place in (0, 1, 3, 4):
                same = each[place] == old[place]
                assert same[:low].all() and same[high:].all()
                old[place].copy_(each[place])


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_what_the_kernel_does_not_read_goes_by_plain_torch(device, launches):
    wanted = [((5, 7), torch.bfloat16), ((6, 4), torch.float32), ((9,), torch.bfloat16), ((2, 3), torch.bfloat16)]
    mine, theirs = ([tensors(shape, kind, kind, 1, device) for shape, kind in wanted] for _ in range(2))
    for each in (mine, theirs):
        each[0] = [one.T for one in each[0]]
        each[1][2] = each[1][2].T.contiguous().T  # the gradient alone
    rows = rows_of([1.0, 2.0, 3.0, 4.0], device=device)
    all_fast(mine, rows)
    for one, other, row in zip(mine, theirs, rows, strict=True):
        plain(*other, row)
        assert_same(one, other)
    assert launches == [2]

    for place, wrong in ((2, lambda one: one[:2]), (3, lambda one: one.double()), (4, lambda one: one.to("meta"))):
        each = tensors((9,), torch.float32, torch.float32, device=device)
        each[place] = wrong(each[place])
        with pytest.raises(RuntimeError):  # from torch, where the kernel would read what lies at the address
            all_fast([each], rows[:1])
    assert launches == [2]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_empty_weights_alone_are_no_launch(device):
    all_fast([tensors((0,), *KINDS, device=device) for _ in range(3)], rows_of([1.0] * 3, device=device))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_a_step_that_is_left_out_leaves_all_weights(device, launches):
    mine, before = ([tensors((n,), *KINDS[:1] * 2, n, device) for n in (5, 300, 64)] for _ in range(2))
    all_fast(mine, rows_of([1.0, 2.0, 3.0], found=1.0, device=device))
    for one, other in zip(mine, before, strict=True):
        assert all(map(torch.equal, one, other))
    assert launches == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("grad_kind", KINDS)
def test_large_weights_beside_small_ones_on_a_gpu(grad_kind):
    sizes = [5_000_011, 64, 1, *([777] * 400), 4096, 4097, 1 << 22]
    mine, theirs = ([tensors((n,), torch.bfloat16, grad_kind, n, "cuda") for n in sizes] for _ in range(2))
    rows = rows_of([1.0 + place % 7 for place in range(len(sizes))], device="cuda")
    for _ in range(3):
        all_fast(mine, rows)
        for each, row in zip(theirs, rows, strict=True):
            plain(*each, row)
    for one, other in zip(mine, theirs, strict=True):
        assert_same(one, other, atol=1e-6)


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait_for_it():
    mine = [tensors((n,), *KINDS, n, "cuda") for n in (5, 300, 64)]
    rows = rows_of([1.0, 2.0, 3.0], device="cuda")
    all_fast(mine, rows)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_fast(mine, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
