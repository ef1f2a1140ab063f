"""The transport problem against POT, the golden weights and formulas.

The file is over 350 lines because all solvers and costs are held to the same problems.
"""

import itertools
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from golden_cases import CASES, GOLDEN, golden, problem, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from otpo.config import OTPOConfig
from otpo.training.metrics import reward_metrics, weight_metrics
from otpo.transport.cost import pairwise_cost
from otpo.transport.options import ProblemKeywords, TransportKeywords, TransportOptions
from otpo.transport.registry import COST_SCALES, COSTS, SOLVERS, Cost, CostKind, CostScale, Solver, solver_names
from otpo.transport.sinkhorn import unbalanced_sinkhorn
from otpo.transport.solve import transport_plan, transport_weights
from otpo.weighting import WEIGHTINGS, PairBatch


@pytest.fixture
def warnings_of(monkeypatch):
    """What the transport has warned of so far, none of it said before."""
    monkeypatch.setattr("otpo.transport.solve._warned", set())
    said = []
    monkeypatch.setattr("otpo.transport.solve.logger.warning", said.append)
    return lambda: list(said)


def test_there_are_25_golden_cases():
    assert len(CASES) == 25


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "rtol"),
    [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-9)],
    ids=["float32", "float64"],
)
def test_golden_weights(case, dtype, tolerance, rtol):
    inputs, regs, want = golden(case, dtype)
    got = transport_weights(*inputs, **regs, tolerance=tolerance, max_iterations=5000)
    assert got.chosen.dtype == got.rejected.dtype == dtype
    assert relative_error(got.chosen, want[0], inputs[2]) < rtol
    assert relative_error(got.rejected, want[1], inputs[3]) < rtol
    assert got.chosen[~inputs[2]].eq(0).all() and got.rejected[~inputs[3]].eq(0).all()
    assert got.residual.max() <= tolerance
    assert got.residual.shape == (3,)


@pytest.mark.parametrize("case", CASES)
def test_few_iterations_suffice(case):
    """Plain Sinkhorn takes up to 79 sweeps where `reg_m` is at most 1 and up to 1468 on the stiff cases."""
    inputs, regs, _ = golden(case, torch.float64)
    limit = 12 if float(GOLDEN[f"{case}/reg_m"]) <= 1 else 40
    assert transport_weights(*inputs, **regs).iterations.max() <= limit


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 23),
    n=st.integers(1, 23),
    reg=st.sampled_from([1.0, 0.5, 0.1, 0.05]),
    reg_m=st.sampled_from([0.05, 0.2, 1.0]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    cost_scale=st.sampled_from(["release", "pairwise"]),
    cost=st.sampled_from(["euclidean", "cosine"]),
)
def test_agrees_with_pot_on_cropped_problems(seed, m, n, reg, reg_m, scale, cost_scale, cost):
    import ot

    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = problem(generator, 1, m, n, scale=scale)
    distances = torch.cdist(chosen[0], rejected[0], compute_mode="donot_use_mm_for_euclid_dist").numpy()
    if cost == "cosine":
        distances = 1 - torch.cosine_similarity(chosen[0][:, None], rejected[0][None], dim=2).numpy()
    largest = distances.max()
    if cost_scale == "release" and cost == "euclidean":
        largest = 1e-6 + max(largest, chosen.norm(dim=2).max().item(), rejected.norm(dim=2).max().item())
    costs = distances / max(largest, 1.0)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        np.ones(m), np.ones(n), costs, reg, reg_m, method="sinkhorn", reg_type="kl", numItermax=20000, stopThr=1e-13
    )
    tau = min(m, n)
    got = transport_weights(
        chosen,
        rejected,
        torch.ones(1, m, dtype=torch.bool),
        torch.ones(1, n, dtype=torch.bool),
        reg=reg,
        reg_m=reg_m,
        cost=cost,
        cost_scale=cost_scale,
        tolerance=1e-11,
    )
    np.testing.assert_allclose(got.chosen[0], plan.sum(1) * tau / plan.sum(), rtol=1e-8)
    np.testing.assert_allclose(got.rejected[0], plan.sum(0) * tau / plan.sum(), rtol=1e-8)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), b=st.integers(1, 4), m=st.integers(1, 19), n=st.integers(1, 19))
def test_padding_and_company_change_nothing(seed, b, m, n):
    """A pair solved alone and cropped equals the pair in a batch with holes, garbage and other pairs."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = problem(generator, b, m, n)
    chosen_mask = torch.rand(b, m, generator=generator) < 0.6
    rejected_mask = torch.rand(b, n, generator=generator) < 0.6
    got = transport_weights(
        chosen.masked_fill(~chosen_mask[..., None], torch.nan),
        rejected.masked_fill(~rejected_mask[..., None], torch.inf),
        chosen_mask,
        rejected_mask,
        reg=0.1,
        tolerance=1e-12,
    )
    tau = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1)).double()
    torch.testing.assert_close(got.chosen.sum(1), tau, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.rejected.sum(1), tau, rtol=1e-12, atol=0)
    for i in range(b):
        if tau[i] == 0:
            assert got.chosen[i].eq(0).all() and got.rejected[i].eq(0).all() and got.residual[i] == 0
            continue
        c, r = chosen[i : i + 1, chosen_mask[i]], rejected[i : i + 1, rejected_mask[i]]
        alone = transport_weights(
            c, r, torch.ones(c.shape[:2]).bool(), torch.ones(r.shape[:2]).bool(), reg=0.1, tolerance=1e-12
        )
        torch.testing.assert_close(got.chosen[i, chosen_mask[i]], alone.chosen[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(got.rejected[i, rejected_mask[i]], alone.rejected[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("reg", [0.01, 0.02, 1.0])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_reg_and_extreme_norms_match_float64(reg, norm, dtype):
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (states.to(dtype) for states in problem(generator, 2, 33, 27, scale=norm))
    masks = torch.ones(2, 33, dtype=torch.bool), torch.ones(2, 27, dtype=torch.bool)
    want = transport_weights(chosen.double(), rejected.double(), *masks, reg=reg, tolerance=1e-12)
    got = transport_weights(chosen, rejected, *masks, reg=reg)
    torch.testing.assert_close(got.chosen, want.chosen.float(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(got.rejected, want.rejected.float(), rtol=1e-5, atol=1e-12)


def test_shared_prefix_stays_exact_in_float32():
    """Equal states are at distance zero however large they are, so float32 equals float64 at small reg."""
    generator = torch.Generator().manual_seed(4)
    prefix = 300 + 50 * torch.randn(1, 20, 64, generator=generator)
    tails = 300 + 50 * torch.randn(2, 9, 64, generator=generator)
    chosen, rejected = (torch.cat([prefix, tail[None]], 1) for tail in tails)
    masks = [torch.ones(1, 29, dtype=torch.bool)] * 2
    want = transport_weights(chosen.double(), rejected.double(), *masks, reg=0.02, tolerance=1e-12)
    got = transport_weights(chosen, rejected, *masks, reg=0.02)
    torch.testing.assert_close(got.chosen, want.chosen.float(), rtol=1e-5, atol=0)


def test_plan_has_the_marginals_and_is_optimal():
    """The plan satisfies the first-order conditions: log G = (f + g - C)/reg with f = -reg_m log(G 1)."""
    generator = torch.Generator().manual_seed(5)
    chosen, rejected = problem(generator, 2, 11, 7)
    masks = torch.ones(2, 11, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    cost = pairwise_cost(chosen, rejected, *masks)
    solved = unbalanced_sinkhorn(cost, *masks, reg=0.1, reg_m=1.0, tolerance=1e-12)
    plan = solved.plan(cost, 0.1)
    torch.testing.assert_close(plan.sum(2), solved.chosen_marginal)
    torch.testing.assert_close(plan.sum(1), solved.rejected_marginal)
    f = -1.0 * plan.sum(2).log()
    g = -1.0 * plan.sum(1).log()
    torch.testing.assert_close(0.1 * plan.log(), f[:, :, None] + g[:, None, :] - cost, rtol=1e-9, atol=1e-9)


def test_identical_responses_give_a_symmetric_plan():
    states = torch.randn(1, 12, 16)
    mask = torch.ones(1, 12, dtype=torch.bool)
    got = transport_weights(states, states, mask, mask, reg=0.1)
    torch.testing.assert_close(got.chosen, got.rejected)


def test_large_reg_is_the_uniform_budget():
    generator = torch.Generator().manual_seed(6)
    chosen, rejected = problem(generator, 1, 10, 4)
    masks = torch.ones(1, 10, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    got = transport_weights(chosen, rejected, *masks, reg=1e6)
    torch.testing.assert_close(got.chosen, torch.full((1, 10), 0.4, dtype=torch.float64), rtol=1e-5, atol=0)


def test_pairwise_scale_keeps_more_contrast_than_release_on_offset_states():
    generator = torch.Generator().manual_seed(7)
    chosen, rejected = problem(generator, 1, 20, 20)
    offset = torch.full((1, 1, 8), 25.0, dtype=torch.float64)
    mask = torch.ones(1, 20, dtype=torch.bool)
    spread = {
        scale: transport_weights(
            chosen + offset, rejected + offset, mask, mask, reg=0.1, cost_scale=scale
        ).chosen.std()
        for scale in ("release", "pairwise")
    }
    assert spread["pairwise"] > 3 * spread["release"]


def test_cosine_costs():
    chosen, rejected = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    chosen[0, 1], rejected[0, 3], rejected[0, 2] = 0.0, chosen[0, 0] * 3, -chosen[0, 0]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    padded = chosen.masked_fill(~mask[..., None], torch.nan), rejected.masked_fill(~mask[..., None], torch.inf)
    got = pairwise_cost(*padded, mask, mask, cost="cosine")
    want = 1 - torch.cosine_similarity(chosen[:, :, None], rejected[:, None], dim=3)
    want = want.masked_fill(~(mask[:, :, None] & mask[:, None]), 0.0)
    torch.testing.assert_close(got, want / want.flatten(1).amax(1).clamp(min=1)[:, None, None])
    assert got[0, 0, 3] < 1e-15 and got[0, 0, 2] == 1 and got[0, 1].eq(got[0, 1, 0]).all()
    for scale, factor in (("pairwise", 7.0), ("release", 1e-30), ("release", 1e30)):
        scaled = pairwise_cost(chosen * factor, rejected / 9, mask, mask, cost="cosine", scale=scale)
        torch.testing.assert_close(scaled, got)
    with pytest.raises(ValueError, match="`cost` must be 'euclidean' or 'cosine', got 'l1'"):
        pairwise_cost(chosen, rejected, mask, mask, cost="l1")


def manhattan(chosen, rejected, *, by_product):
    return torch.cdist(chosen, rejected, p=1)


@pytest.mark.parametrize("scale", ["release", "pairwise"])
def test_a_new_cost_is_one_function_and_one_entry(scale, monkeypatch, tmp_path):
    from_zero = lambda states: states.abs().sum(2)  # noqa: E731
    monkeypatch.setitem(COSTS, "l1", CostKind(manhattan, "their distance by sums", "nobody", from_zero))
    chosen, rejected = torch.randn(2, 1, 6, 5, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    want = torch.cdist(chosen, rejected, p=1)
    largest = max(want.max(), 1e-6 + max(from_zero(chosen).max(), from_zero(rejected).max()) * (scale == "release"))
    costs = pairwise_cost(chosen, rejected, mask, mask, cost="l1", scale=scale)
    torch.testing.assert_close(costs, want / largest, rtol=1e-6, atol=0)
    options = {"reg": 0.1, "cost": "l1", "cost_scale": scale}
    solved = unbalanced_sinkhorn(costs, mask, mask, reg=0.1, reg_m=0.2)
    weights = transport_weights(chosen, rejected, mask, mask, **options)
    torch.testing.assert_close(weights.chosen, 6 * solved.chosen_marginal / solved.chosen_marginal.sum())
    torch.testing.assert_close(transport_plan(chosen[0], rejected[0], **options).sum(1), weights.chosen[0])
    args = OTPOConfig(str(tmp_path), ot_cost="l1", ot_cost_scale=scale, use_cpu=True, bf16=False)
    assert args.describe_weighting() == f"otpo, ot_reg 1, ot_reg_m 0.2, ot_cost l1, ot_cost_scale {scale}"
    with pytest.raises(ValueError, match="`cost` must be 'euclidean', 'cosine' or 'l1', got 'l2'"):
        transport_weights(chosen, rejected, mask, mask, cost="l2")


def test_names_for_type_checkers_are_those_of_the_registries():
    assert get_args(Cost) == tuple(COSTS) and get_args(CostScale) == tuple(COST_SCALES)
    assert get_args(Solver) == tuple(solver_names())
    for keywords, without in ((TransportKeywords, set()), (ProblemKeywords, {"solver"})):
        assert set(get_type_hints(keywords)) == {entry.name for entry in fields(TransportOptions)} - without
    for kind in (*COSTS.values(), *SOLVERS.values()):
        assert callable(kind.load()) and kind.help and kind.source


def test_options_are_frozen_and_errors_name_them_as_the_user_does():
    options = TransportOptions(reg=0.1)
    with pytest.raises(FrozenInstanceError):
        options.reg = 1.0
    for name, value in {"reg": 0, "reg_m": -1, "tolerance": 0, "max_iterations": 0, "cost": "", "solver": ""}.items():
        for prefix in ("", "ot_"):
            with pytest.raises(ValueError, match=f"^`{prefix}{name}` must be "):
                TransportOptions(**{name: value}, prefix=prefix)
    with pytest.raises(TypeError, match="solver"):
        transport_plan(torch.randn(2, 3), torch.randn(2, 3), solver="triton")  # the kernels keep no plan


def test_iteration_limit_is_kept_and_residual_says_so():
    inputs, regs, _ = golden("case18", torch.float32)
    got = transport_weights(*inputs, **regs, max_iterations=3)
    assert got.iterations.max() == 3
    assert got.residual.max() > 1e-4


@pytest.mark.parametrize("cost", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_state_that_is_not_finite_spoils_its_own_pair_at_once(cost, value):
    states = torch.randn(2, 3, 9, 8)
    mask = torch.ones(3, 9, dtype=torch.bool)
    states[0, 1, 4, 2] = value
    got = transport_weights(*states, mask, mask, cost=cost)
    assert got.chosen[1].isnan().all() and got.residual[1].isnan() and got.iterations[1] == 1
    assert got.chosen[[0, 2]].isfinite().all() and got.rejected[[0, 2]].isfinite().all()


@pytest.mark.lengthy
def test_chunks_of_pairs_change_nothing():
    inputs, regs, _ = golden("case01", torch.float32)
    whole = transport_weights(*inputs, **regs)
    one_by_one = transport_weights(*inputs, **regs, memory_budget=1)
    for name in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(one_by_one, name), getattr(whole, name), rtol=1e-6, atol=0)
    assert one_by_one.iterations.equal(whole.iterations)


def test_weights_carry_no_gradient():
    states = torch.randn(1, 5, 4, requires_grad=True)
    mask = torch.ones(1, 5, dtype=torch.bool)
    got = transport_weights(states, states * 2, mask, mask)
    assert not got.chosen.requires_grad


@pytest.mark.parametrize("name", ["reg", "reg_m"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_regularisation_is_refused_by_name(name, value):
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"`{name}` must be a positive finite number"):
        unbalanced_sinkhorn(torch.zeros(1, 3, 3), mask, mask, **{"reg": 1.0, "reg_m": 1.0, name: value})


def test_unknown_cost_scale_is_refused():
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`cost_scale` must be 'release' or 'pairwise', got 'max'"):
        pairwise_cost(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), mask, mask, scale="max")


def test_all_pairs_empty():
    empty = torch.zeros(2, 4, dtype=torch.bool)
    got = transport_weights(torch.randn(2, 4, 3), torch.randn(2, 4, 3), empty, empty)
    assert got.chosen.eq(0).all() and got.rejected.eq(0).all() and got.residual.eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_golden_weights_on_cuda(case):
    inputs, regs, want = golden(case, torch.float32)
    got = transport_weights(*(tensor.cuda() for tensor in inputs), **regs, solver="torch")
    assert got.solver == "torch"
    assert relative_error(got.chosen.cpu(), want[0], inputs[2]) < 1e-5
    assert relative_error(got.rejected.cpu(), want[1], inputs[3]) < 1e-5


@pytest.mark.gpu
def test_the_loop_waits_for_the_device_every_fifth_sweep_only():
    inputs, regs, _ = golden("case18", torch.float32)
    chosen, rejected, chosen_mask, rejected_mask = (tensor.cuda() for tensor in inputs)
    cost = pairwise_cost(chosen, rejected, chosen_mask, rejected_mask)
    unbalanced_sinkhorn(cost, chosen_mask, rejected_mask, **regs, max_iterations=4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        unbalanced_sinkhorn(cost, chosen_mask, rejected_mask, **regs, max_iterations=4)
        with pytest.raises(RuntimeError, match="synchroniz"):
            unbalanced_sinkhorn(cost, chosen_mask, rejected_mask, **regs, max_iterations=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shares_in_high_precision(cost, reg, reg_m, sweeps=4000):
    """The normalised marginals by plain Sinkhorn in 60 digits, which know no underflow."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    cost = [[Decimal(value) / Decimal(reg) for value in row] for row in cost.tolist()]
    columns = [list(column) for column in zip(*cost, strict=True)]
    phi = Decimal(reg_m) / (Decimal(reg_m) + Decimal(reg))

    def half(costs, potential):
        sums = [sum((p - c).exp() for c, p in zip(row, potential, strict=True)).ln() for row in costs]
        return [-phi * value for value in sums], sums

    b = [Decimal(0)] * len(columns)
    for _ in range(sweeps):
        a, _ = half(cost, b)
        new, sums = half(columns, a)
        moved = max(abs(x - y) for x, y in zip(new, b, strict=True))
        if moved < Decimal("1e-12"):
            break
        b = new
    masses = [(-value * Decimal(reg) / Decimal(reg_m)).exp() for value in a]
    others = [(x + y).exp() for x, y in zip(b, sums, strict=True)]
    return [[float(value / sum(side)) for value in side] for side in (masses, others)]


@pytest.mark.parametrize("solver", ["torch", "triton"])
@pytest.mark.parametrize("regs", [(1e-4, 1e-4), (1e-3, 5e-4), (1.0, 1e-5), (1e3, 1e3), (0.05, 0.02)], ids=str)
def test_masses_that_no_number_holds_have_their_shares(regs, solver):
    """At `reg_m` 1e-4 the mass is exp(-2000) or less; its shares are ordinary numbers."""
    reg, reg_m = regs
    if solver == "triton":
        pytest.importorskip("triton", reason="triton is made for Linux")
        if reg < 0.01 or reg_m < 0.02:
            pytest.skip("torch takes over there, with a warning")
        if torch.cuda.is_available():
            pytest.skip("the kernels' own tests run on the GPU")
    generator = torch.Generator().manual_seed(8)
    chosen, rejected = (states.float() for states in problem(generator, 1, 5, 4))
    masks = torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    want = shares_in_high_precision(pairwise_cost(chosen, rejected, *masks)[0], reg, reg_m)
    got = transport_weights(chosen, rejected, *masks, reg=reg, reg_m=reg_m, solver=solver)
    assert got.residual.max() <= 1e-6
    for weights, shares in zip((got.chosen, got.rejected), want, strict=True):
        torch.testing.assert_close(weights[0] / 4, torch.tensor(shares), rtol=1e-5, atol=1e-12)
        assert weights.sum().item() == pytest.approx(4, abs=1e-5)
    plan = transport_plan(chosen[0], rejected[0], reg=reg, reg_m=reg_m)
    torch.testing.assert_close(plan.sum(1).float(), got.chosen[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.sum(0).float(), got.rejected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (9, 1), (6, 11)], ids=str)
@pytest.mark.parametrize("kind", [{}, {"cost_scale": "pairwise"}, {"cost": "cosine"}], ids=str)
def test_weights_sum_to_the_budget_or_a_warning_says_what_to_set(sizes, kind, warnings_of):
    m, n = sizes
    chosen, rejected = torch.randn(2, m, 6), torch.randn(2, n, 6)
    masks = torch.ones(2, m, dtype=torch.bool), torch.ones(2, n, dtype=torch.bool)
    masks[0][1, -1] = masks[1][1, -1] = False  # an empty side where there is one token
    budget = torch.minimum(masks[0].sum(1), masks[1].sum(1)).float()
    for reg, reg_m in itertools.product((1e-5, 1e-3, 0.1, 1e3), repeat=2):
        said = len(warnings_of())
        got = transport_weights(chosen, rejected, *masks, reg=reg, reg_m=reg_m, max_iterations=60, **kind)
        torch.testing.assert_close(got.chosen.sum(1), budget, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.rejected.sum(1), budget, rtol=1e-5, atol=1e-6)
        new = warnings_of()[said:]
        assert len(new) == int(got.residual.max() > 1e-6)
        for message in new:
            assert "after 60 sweeps at a residual of" in message and f"(`reg` {reg:g}, `reg_m` {reg_m:g})" in message
            assert "`ot_reg`" in message and "`ot_reg_m`" in message and "`ot_max_iterations`" in message
        plan = transport_plan(chosen[0], rejected[0], reg=reg, reg_m=reg_m, max_iterations=60, **kind)
        assert plan.sum().item() == pytest.approx(min(m, n), rel=1e-9)


def test_a_warning_comes_once_and_not_for_states_that_are_not_finite(warnings_of):
    states, mask = torch.randn(2, 1, 6, 4), torch.ones(1, 6, dtype=torch.bool)
    for _ in range(3):
        transport_weights(*states, mask, mask, reg=1e-3, max_iterations=2)
    states[0, 0, 0, 0] = torch.nan
    got = transport_weights(*states, mask, mask, reg=2e-3, max_iterations=2)
    assert got.residual.isnan().all() and got.chosen.isnan().all() and got.rejected.isnan().all()
    assert transport_plan(states[0, 0], states[1, 0]).isnan().all()
    assert len(warnings_of()) == 1


class WithoutFloat64(TorchDispatchMode):
    """A device like Apple's, whose tensors can't be float64; numbers of no dimension are Python's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.dim():
                raise TypeError(f"{func} makes a float64 tensor, which MPS has not.")
        return result


@pytest.mark.parametrize("regs", [(1.0, 0.2), (0.1, 1.0), (0.02, 0.2), (0.01, 1.0), (0.05, 10.0)], ids=str)
def test_devices_without_float64_stop_where_float32_stalls(regs, monkeypatch, warnings_of):
    reg, reg_m = regs
    generator = torch.Generator().manual_seed(9)
    chosen, rejected = (states.float() for states in problem(generator, 2, 30, 23))
    masks = torch.ones(2, 30, dtype=torch.bool), torch.ones(2, 23, dtype=torch.bool)
    masks[0][1, 4:] = False
    want = transport_weights(chosen, rejected, *masks, reg=reg, reg_m=reg_m, tolerance=1e-10)
    for module in ("cost", "solve"):
        monkeypatch.setattr(f"otpo.transport.{module}.wide_dtype", lambda device: torch.float32)
    with WithoutFloat64():
        got = transport_weights(chosen, rejected, *masks, reg=reg, reg_m=reg_m)
        plan = transport_plan(chosen[0], rejected[0], reg=reg, reg_m=reg_m)
        assert transport_plan(chosen[0, :0], rejected[0]).shape == (0, 23)
    assert got.iterations.max() < 150 and got.residual.max() < 1e-4 and not warnings_of()
    torch.testing.assert_close(got.chosen, want.chosen, rtol=3e-4, atol=0)
    torch.testing.assert_close(got.rejected, want.rejected, rtol=3e-4, atol=0)
    torch.testing.assert_close(plan.sum(1), got.chosen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(name for name, kind in WEIGHTINGS.items() if kind.bundle is None))
def test_weightings_and_metrics_need_no_float64(name, monkeypatch, tmp_path):
    mask = torch.rand(6, 9) < 0.7
    args = OTPOConfig(str(tmp_path), weighting=name, ld_alpha=0.5, use_cpu=True, bf16=False)
    batch = PairBatch(mask, torch.randint(0, 50, mask.shape), -torch.rand(mask.shape), torch.randn(6, 9, 4))
    values = {"unmatched": (torch.rand(6, 9) < 0.5).float(), "given_weights": torch.rand(6, 9)}
    batch = replace(batch, reference_logps=-torch.rand(mask.shape), token_values=values)
    want = weight_metrics(WEIGHTINGS[name](args)(batch), mask)
    rewards = torch.randn(6)
    wanted_rewards = reward_metrics(rewards, "")
    monkeypatch.setattr("otpo.training.metrics.wide_dtype", lambda device: torch.float32)
    with WithoutFloat64():
        got = weight_metrics(WEIGHTINGS[name](args)(batch), mask)
        got_rewards = reward_metrics(rewards, "")
    assert got_rewards.keys() == wanted_rewards.keys() and got.keys() == want.keys()
    assert all(torch.equal(got_rewards[key], wanted_rewards[key]) for key in wanted_rewards)
    for key in want:
        assert got[key].dtype == torch.float32 and want[key].dtype == torch.float64
        torch.testing.assert_close(got[key].double(), want[key], rtol=1e-5, atol=1e-6, equal_nan=True)
