"""The Triton transport against float64 in plain torch: on the CPU by Triton's interpreter, on a GPU compiled."""

from typing import Any

import pytest
import torch
from golden_cases import CASES, golden, problem, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from otpo.transport.solve import transport_weights

pytest.importorskip("triton", reason="triton is made for Linux")
from otpo_kernels.distance import distances, valid_tokens
from otpo_kernels.sinkhorn import token_transport

# The interpreter computes, in numpy, entries that are masked afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def solve(chosen, rejected, chosen_mask, rejected_mask, **options):
    tensors = (chosen, rejected, chosen_mask, rejected_mask)
    return token_transport(*(tensor.to(DEVICE) for tensor in tensors), **options)


def assert_right(got, inputs, rtol=1e-4, release_scale=True, cosine=False, **regs):
    """Every weight is within `rtol` of the float64 solution of the same states, and zero outside the mask."""
    chosen, rejected, chosen_mask, rejected_mask = inputs
    kind: Any = {
        "cost_scale": "release" if release_scale else "pairwise",
        "cost": "cosine" if cosine else "euclidean",
    }
    want = transport_weights(
        chosen.double(), rejected.double(), chosen_mask, rejected_mask, **kind, tolerance=1e-11, **regs
    )
    for name, mask in (("chosen", chosen_mask), ("rejected", rejected_mask)):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(want, name).float(), rtol=rtol, atol=1e-30)
        assert getattr(got, name).cpu()[~mask].eq(0).all()
    assert got.residual.max() <= 1e-6


def full(*shape):
    return torch.ones(*shape, dtype=torch.bool)


@pytest.mark.parametrize("case", CASES)
def test_golden_weights(case):
    inputs, regs, want = golden(case, torch.float32)
    got = solve(*inputs, **regs)
    assert relative_error(got.chosen.cpu(), want[0], inputs[2]) < 1e-5
    assert relative_error(got.rejected.cpu(), want[1], inputs[3]) < 1e-5
    assert got.residual.max() <= 1e-6
    assert got.iterations.max() <= (20 if regs["reg_m"] <= 1 else 100)


@pytest.mark.parametrize("hidden", [4, 12, 32])
@pytest.mark.parametrize("regs", [(0.1, 0.2), (0.1, 1.0), (0.05, 10.0)], ids=str)
def test_few_dimensions_are_multiplied_without_loss(hidden, regs):
    """Nothing averages out over few dimensions: two bfloat16 parts of float32 states leave 2e-5 here."""
    generator = torch.Generator().manual_seed(hidden)
    chosen, rejected = (states.float() for states in problem(generator, 2, 21, 18, d=hidden))
    rejected[:, :6] = chosen[:, :6]
    inputs = (chosen, rejected, full(2, 21), full(2, 18))
    options = {"reg": regs[0], "reg_m": regs[1], "release_scale": False}
    assert_right(solve(*inputs, **options), inputs, rtol=1e-5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_states_with_a_large_common_part(dtype):
    """The bound that the docstring states: differences of a tenth of the norms, the smallest usual `reg`."""
    generator = torch.Generator().manual_seed(5)
    common = 10 * torch.randn(1, 1, 32, generator=generator)
    chosen, rejected = ((states.float() + common).to(dtype) for states in problem(generator, 2, 17, 20, d=32, scale=1))
    inputs = (chosen, rejected, full(2, 17), full(2, 20))
    options = {"reg": 0.02, "reg_m": 0.2, "release_scale": False}
    assert_right(solve(*inputs, **options), inputs, rtol=3e-4, **options)


@pytest.mark.lengthy
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    b=st.integers(1, 3),
    m=st.integers(1, 37),
    n=st.integers(1, 37),
    d=st.integers(1, 40),
    keep=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    reg=st.sampled_from([1.0, 0.1, 0.02]),
    reg_m=st.sampled_from([0.05, 0.2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    release_scale=st.booleans(),
    cosine=st.booleans(),
)
def test_any_shape_and_mask(seed, b, m, n, d, keep, reg, reg_m, dtype, release_scale, cosine):
    """Holes, empty responses and single tokens; what lies outside the masks is never read as a number."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (states.to(dtype) for states in problem(generator, b, m, n, d))
    chosen_mask = torch.rand(b, m, generator=generator) < keep
    rejected_mask = torch.rand(b, n, generator=generator) < keep
    inputs = (chosen, rejected, chosen_mask, rejected_mask)
    got = solve(
        chosen.masked_fill(~chosen_mask[..., None], torch.nan),
        rejected.masked_fill(~rejected_mask[..., None], torch.inf),
        chosen_mask,
        rejected_mask,
        reg=reg,
        reg_m=reg_m,
        release_scale=release_scale,
        cosine=cosine,
    )
    assert_right(got, inputs, reg=reg, reg_m=reg_m, release_scale=release_scale, cosine=cosine)
    empty = ~(chosen_mask.any(1) & rejected_mask.any(1))
    assert got.residual.cpu()[empty].eq(0).all() and got.iterations.cpu()[empty].eq(0).all()


@pytest.mark.parametrize("reg", [0.01, 0.02, 1.0])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_reg_and_extreme_norms(reg, norm, dtype):
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (states / states.norm(dim=2, keepdim=True) for states in problem(generator, 2, 33, 27, 24))
    chosen, rejected = ((norm * states).to(dtype) for states in (chosen, rejected))
    inputs = (chosen, rejected, full(2, 33), full(2, 27))
    assert_right(solve(*inputs, reg=reg, reg_m=0.2), inputs, reg=reg, reg_m=0.2)


def test_the_smallest_marginal_weight():
    inputs = (*(3 * torch.randn(2, 20, 16) for _ in range(2)), full(2, 20), full(2, 20))
    for reg in (0.01, 1.0):
        assert_right(solve(*inputs, reg=reg, reg_m=0.02), inputs, reg=reg, reg_m=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shared_prefix_is_at_distance_zero(dtype):
    """Large and nearly equal states: the product alone would leave their distances a hundred times too large."""
    prefix = 300 + 5 * torch.randn(1, 20, 64)
    chosen, rejected = (torch.cat([prefix, 300 + 5 * torch.randn(1, 9, 64)], 1).to(dtype) for _ in range(2))
    inputs = (chosen, rejected, full(1, 29), full(1, 29))
    tensors = [tensor.to(DEVICE) for tensor in inputs]
    found = torch.empty(1, 29, 29, device=DEVICE)
    distances(*tensors[:2], valid_tokens(*tensors), found)
    assert found[0].diagonal()[:20].eq(0).all()
    want = torch.cdist(chosen.double(), rejected.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found.cpu(), want.float(), rtol=1e-5, atol=0)
    for options in ({"release_scale": True}, {"release_scale": False}, {"cosine": True}):
        assert_right(solve(*inputs, reg=0.02, reg_m=0.2, **options), inputs, reg=0.02, reg_m=0.2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cosine_distances(dtype):
    """Equal, parallel, opposite and zero states among states whose norms are far apart."""
    chosen, rejected = torch.randn(2, 1, 21, 48)
    # The interpreter's products of bfloat16, and so of float32, are garbage: it takes those distances from
    # differences, which cancel. Its products of float16 are right.
    chosen[0, ::4] *= 1000 if DEVICE == "cuda" or dtype == torch.float16 else 10
    rejected[0, :5] = chosen[0, :5]
    rejected[0, 5], rejected[0, 6], rejected[0, 7] = 2 * chosen[0, 5], -chosen[0, 6], 0.0
    tensors = [tensor.to(DEVICE) for tensor in (chosen.to(dtype), rejected.to(dtype), full(1, 21), full(1, 21))]
    found = torch.empty(1, 21, 21, device=DEVICE)
    distances(*tensors[:2], valid_tokens(*tensors), found, cosine=True)
    wide = [states.double() for states in tensors[:2]]
    want = 1 - torch.cosine_similarity(wide[0][0][:, None], wide[1][0][None], dim=2)
    torch.testing.assert_close(found[0].double(), want, rtol=0, atol=3e-6)
    assert found[0].diagonal()[:5].abs().max() < 1e-7 and found[0, :, 7].eq(1).all()


@pytest.mark.parametrize("norm", [1e-16, 1e-8, 1e4])
def test_cosines_take_no_notice_of_norms(norm):
    states = (norm * states / states.norm(dim=2, keepdim=True) for states in torch.randn(2, 2, 19, 24))
    inputs = (*states, full(2, 19), full(2, 19))
    options = {"reg": 0.02, "reg_m": 0.2, "cosine": True}
    for release_scale in (True, False):
        assert_right(solve(*inputs, **options, release_scale=release_scale), inputs, **options)


def test_transposed_and_sliced_inputs():
    chosen, rejected = torch.randn(24, 2, 30).transpose(0, 1), torch.randn(2, 17, 60)[..., ::2]
    chosen_mask, rejected_mask = torch.rand(24, 2).transpose(0, 1) < 0.7, full(4, 17)[::2]
    inputs = (chosen, rejected, chosen_mask, rejected_mask)
    assert_right(solve(*inputs, reg=0.1, reg_m=0.2), inputs, reg=0.1, reg_m=0.2)


@pytest.mark.lengthy
def test_chunks_of_pairs_change_nothing():
    inputs = (torch.randn(5, 19, 8), torch.randn(5, 23, 8), torch.rand(5, 19) < 0.7, torch.rand(5, 23) < 0.7)
    whole = solve(*inputs, reg=0.1, reg_m=1.0)
    for memory_budget in (0, 2 * 4 * 19 * 23):
        chunked = solve(*inputs, reg=0.1, reg_m=1.0, memory_budget=memory_budget)
        # On a GPU another chunk is another number of programs a pair, and so another order of summation.
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_no_pairs_or_no_positions(shape):
    b, m, n = shape
    got = solve(torch.randn(b, m, 8), torch.randn(b, n, 8), full(b, m), full(b, n), reg=1.0, reg_m=0.2)
    assert got.chosen.shape == (b, m) and got.rejected.shape == (b, n)
    assert got.chosen.eq(0).all() and got.rejected.eq(0).all() and got.iterations.eq(0).all()


def test_the_iteration_limit_is_kept_and_the_residual_says_so():
    inputs, regs, _ = golden("case18", torch.float32)
    got = solve(*inputs, **regs, max_iterations=3)
    assert got.iterations.eq(3).all() and got.residual.max() > 1e-4


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("cosine", [False, True])
def test_a_state_that_is_not_finite_spoils_its_own_pair_only(value, side, cosine):
    states = torch.randn(2, 3, 9, 8)
    clean = solve(*states, full(3, 9), full(3, 9), reg=0.1, reg_m=0.2, cosine=cosine)
    states[side, 1, 4, 2] = value
    got = solve(*states, full(3, 9), full(3, 9), reg=0.1, reg_m=0.2, cosine=cosine)
    assert got.chosen[[0, 2]].equal(clean.chosen[[0, 2]]) and got.rejected[[0, 2]].equal(clean.rejected[[0, 2]])
    assert got.residual[1].isnan() and got.chosen[1].isnan().all() and got.rejected[1].isnan().all()
    assert got.iterations[1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": 0.001}, "`reg` must be finite and at least 0.01 for the kernels, got 0.001"),
        ({"reg_m": 0.001}, "`reg_m` must be finite and at least 0.02"),
        ({"reg_m": float("inf")}, "`reg_m` must be finite"),
        ({"tolerance": float("nan")}, "`tolerance` must be finite and at least 1e-06"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    inputs = (torch.randn(1, 3, 4), torch.randn(1, 3, 4), full(1, 3), full(1, 3))
    with pytest.raises(ValueError, match=message):
        solve(*inputs, **{"reg": 1.0, "reg_m": 0.2, **options})


def test_dtypes_out_of_range_are_refused():
    inputs = (torch.randn(1, 3, 4), torch.randn(1, 3, 4).double(), full(1, 3), full(1, 3))
    with pytest.raises(ValueError, match=r"share a dtype .* torch.float32 and torch.float64"):
        solve(*inputs, reg=1.0, reg_m=0.2)


def gpu_problem(pairs, length, hidden, dtype):
    """Responses of unequal lengths that share a prefix, with states as large as a language model's."""
    x, y = torch.randn(2, pairs, length, hidden, device="cuda")
    y = 0.5 * x.roll(7, 1) + y
    y[:, : length // 8] = x[:, : length // 8]
    x, y = (40 * states / states.norm(dim=2, keepdim=True) for states in (x, y))
    lengths = torch.randint(length // 2, length + 1, (2, pairs, 1), device="cuda")
    masks = torch.arange(length, device="cuda") < lengths
    return x.to(dtype), y.to(dtype), *masks


@pytest.mark.gpu
@pytest.mark.parametrize("regs", [(1.0, 0.2), (0.1, 1.0), (0.02, 0.2), (0.05, 10.0)], ids=str)
@pytest.mark.parametrize("shape", [(8, 1024, 4096), (3, 777, 1000), (2, 2048, 512), (1, 8192, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cost", ["euclidean", "cosine"])
def test_large_problems_match_float64(regs, shape, dtype, cost):
    inputs = gpu_problem(*shape, dtype)
    reg, reg_m = regs
    got = token_transport(*inputs, reg=reg, reg_m=reg_m, cosine=cost == "cosine")
    want = transport_weights(
        *inputs, reg=reg, reg_m=reg_m, cost=cost, tolerance=1e-10, solver="torch", memory_budget=1 << 32
    )
    torch.testing.assert_close(got.chosen, want.chosen, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(got.rejected, want.rejected, rtol=1e-4, atol=1e-30)
    assert got.residual.max() <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_bit_by_bit(dtype):
    inputs = gpu_problem(8, 1024, 512, dtype)
    first = token_transport(*inputs, reg=0.1, reg_m=1.0)
    for _ in range(20):
        assert all(
            torch.equal(*pair) for pair in zip(token_transport(*inputs, reg=0.1, reg_m=1.0), first, strict=True)
        )


@pytest.mark.gpu
def test_another_length_compiles_nothing_anew():
    from otpo_kernels.sinkhorn_kernel import sinkhorn_kernel

    def compiled():
        return sum(len(caches[0]) for caches in sinkhorn_kernel.device_caches.values())

    for length in (600, 1024):
        token_transport(*gpu_problem(8, length, 128, torch.bfloat16), reg=0.1, reg_m=1.0)
    before = compiled()
    for length in (601, 777, 960, 1001):
        token_transport(*gpu_problem(8, length, 128, torch.bfloat16), reg=0.3, reg_m=0.5)
    assert compiled() == before > 0


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    inputs = gpu_problem(4, 512, 256, torch.bfloat16)
    transport_weights(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = transport_weights(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.solver == "triton"


@pytest.mark.gpu
def test_memory_stays_within_the_budget():
    inputs = gpu_problem(16, 1024, 256, torch.bfloat16)
    budget = 4 * 4 * 1024 * 1024
    token_transport(*inputs, reg=1.0, reg_m=0.2, memory_budget=budget)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_transport(*inputs, reg=1.0, reg_m=0.2, memory_budget=budget)
    rest = 4 * (2 * 8 + 5) * 1024 * 8 + 264 * 1024 * 4  # the history in float64 and each program's columns
    assert torch.cuda.max_memory_allocated() - before < budget + rest + (1 << 20)
