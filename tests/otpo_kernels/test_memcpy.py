"""The memcpy operator against plain loops in float64: on the CPU by Triton's interpreter, on a GPU compiled.

The file is over 350 lines because every test here leans on the definitions by loops at the top.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton", reason="triton is made for Linux")
from otpo_kernels import memcpy, routing
from otpo_kernels.memcpy import permute, reorder, route, route_by_counts, unpermute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}
CASES = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 40) | st.just(270),
        "slots": st.integers(1, 5),
        "experts": st.integers(5, 20),
        "hidden": st.sampled_from([1, 3, 16, 37, 64]),
        "alignment": st.sampled_from([1, 1, 8, 16]),
        "dropped": st.sampled_from([0.0, 0.3, 1.0]),
        "seed": st.integers(0, 2**30),
    }
)


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    """The kernels, and the plain torch that runs where Triton does not."""
    if request.param == "torch":
        monkeypatch.setattr(routing, "runs_in_triton", lambda tensor: False)
        monkeypatch.setattr(memcpy, "runs_in_triton", lambda tensor: False)
    return request.param


def choose(tokens, slots, experts, dropped=0.0, **_):
    """Distinct experts for each token, some of them replaced by the mark of an expert held elsewhere."""
    index = torch.rand(tokens, experts).argsort(1)[:, :slots]
    return torch.where(torch.rand(tokens, slots) < dropped, experts, index)


def place(index, experts, alignment):
    """Rows of the slots by definition: experts in order, each one's slots in order, groups padded."""
    rows, end, offsets, counts = {}, 0, [], []
    for expert in range(experts):
        chosen = [
            (token, slot)
            for token, of_token in enumerate(index.tolist())
            for slot, e in enumerate(of_token)
            if e == expert
        ]
        rows |= {where: end + place for place, where in enumerate(chosen)}
        end += -(-len(chosen) // alignment) * alignment
        offsets.append(end)
        counts.append(len(chosen))
    return rows, offsets, counts


def check_route(index, experts, alignment):
    got = route(index.to(DEVICE), experts, alignment=alignment)
    rows, offsets, counts = place(index, experts, alignment)
    tokens, slots = index.shape
    want = [[rows.get((token, slot), -1) for slot in range(slots)] for token in range(tokens)]
    assert got.destinations.tolist() == want
    assert got.offsets.tolist() == offsets
    assert got.counts.tolist() == counts
    assert got.rows >= offsets[-1]
    assert {part.dtype for part in got[:3]} == {torch.int32}
    return got


def with_nothing(rows):
    """Rows and a last one of zeros, which -1 indexes."""
    return torch.cat([rows, rows.new_zeros(1, rows.size(1))])


def check_moves(index, experts, hidden, dtype, alignment=1, weights_dtype=None):
    """Both moves and every gradient against loops in float64."""
    routing_ = check_route(index, experts, alignment)
    tokens, slots = index.shape
    destinations = routing_.destinations.cpu().long()
    x = torch.randn(tokens, hidden, device=DEVICE).to(dtype).requires_grad_()
    weights = torch.rand(tokens, slots, device=DEVICE).to(weights_dtype or dtype).requires_grad_()

    moved = permute(x, routing_)
    want = torch.zeros(routing_.rows, hidden, dtype=dtype)
    for token, slot in (destinations >= 0).nonzero().tolist():
        want[destinations[token, slot]] = x[token].detach().cpu()
    assert torch.equal(moved.cpu(), want)

    rows = torch.randn(routing_.rows, hidden, device=DEVICE).to(dtype)
    taken = torch.zeros(routing_.rows, dtype=torch.bool)
    taken[destinations[destinations >= 0]] = True
    rows[~taken.to(DEVICE)] = float("nan")  # what belongs to no slot must not be read
    rows.requires_grad_()
    plain, weighted = unpermute(rows, routing_), unpermute(rows, routing_, weights)

    x64, rows64, weights64 = (
        tensor.detach().double().cpu().nan_to_num().requires_grad_() for tensor in (x, rows, weights)
    )
    present = (destinations >= 0)[..., None]
    of_slots = with_nothing(rows64)[destinations]
    plain64, weighted64 = of_slots.sum(1), (of_slots * weights64[..., None]).sum(1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(plain.cpu().double(), plain64, **tolerance)
    torch.testing.assert_close(weighted.cpu().double(), weighted64, **tolerance)
    assert plain.dtype == weighted.dtype == dtype

    grad_moved, grad = torch.randn_like(moved), torch.randn_like(weighted)
    moved64 = x64[torch.arange(tokens).repeat_interleave(slots)].view(tokens, slots, hidden) * present
    grad_moved64 = torch.where(taken[:, None], grad_moved.detach().cpu().double(), 0.0)
    of_grad = with_nothing(grad_moved64)[destinations]
    grad64 = grad.detach().cpu().double()
    want = {
        "x": torch.autograd.grad(moved64, x64, of_grad)[0],
        "rows, plain": torch.autograd.grad(plain64, rows64, grad64, retain_graph=True)[0],
        "rows": torch.autograd.grad(weighted64, rows64, grad64, retain_graph=True)[0],
        "weights": torch.autograd.grad(weighted64, weights64, grad64)[0],
    }
    got = {
        "x": torch.autograd.grad(moved, x, grad_moved)[0],
        "rows, plain": torch.autograd.grad(plain, rows, grad)[0],
        **dict(zip(("rows", "weights"), torch.autograd.grad(weighted, (rows, weights), grad), strict=True)),
    }
    for name, gradient in got.items():
        own = TOLERANCE[weights_dtype or dtype] if name == "weights" else tolerance  # rows may be finer than weights
        limits = {key: max(tolerance[key], own[key]) for key in tolerance}
        limits["atol"] *= max(1.0, hidden**0.5) if name == "weights" else 1.0
        torch.testing.assert_close(gradient.cpu().double(), want[name], **limits, msg=lambda m, n=name: f"{n}: {m}")
    assert got["rows"].cpu()[~taken].eq(0).all()


@pytest.mark.lengthy
@settings(max_examples=25 if DEVICE == "cpu" else 8, deadline=None)  # a GPU tunes and compiles each new shape
@given(case=CASES, dtype=st.sampled_from(DTYPES))
def test_kernels_are_the_definition(case, dtype):
    torch.manual_seed(case["seed"])
    check_moves(choose(**case), case["experts"], case["hidden"], dtype, case["alignment"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "hidden"),
    [
        (1, 1, 1, 8),  # one of everything
        (1, 4, 4, 33),  # every expert is taken
        (23, 8, 8, 16),
        (17, 1, 300, 24),  # most experts get nothing
        (0, 2, 3, 8),
        (5, 2, 3, 0),
    ],
)
def test_ends_of_the_range(backend, tokens, slots, experts, hidden, alignment, dtype):
    check_moves(choose(tokens, slots, experts), experts, hidden, dtype, alignment)


def test_one_expert_takes_all(backend):
    check_moves(torch.full((70, 2), 3), 5, 16, torch.float32)
    check_moves(torch.full((600, 1), 0, dtype=torch.int32), 1, 4, torch.float32, alignment=128)


def test_all_slots_dropped(backend):
    check_moves(torch.full((9, 2), 4), 4, 16, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)]
)
def test_weights_of_another_dtype(backend, dtype, weights_dtype):
    check_moves(choose(20, 3, 6), 6, 24, dtype, weights_dtype=weights_dtype)


def test_indices_outside_are_dropped(backend):
    index = torch.tensor([[0, -1], [2**32, 1], [7, 2]])
    got = route(index.to(DEVICE), 3)
    assert got.destinations.tolist() == [[0, -1], [-1, 1], [-1, 2]]
    assert got.counts.tolist() == [1, 1, 1]


def test_strided_rows_move_as_they_are(backend):
    index = choose(11, 2, 4).to(DEVICE)
    wide = torch.randn(11, 64, device=DEVICE)
    for x in (wide[:, :24], wide[:, ::2], wide[:, :11].T, wide[:, :1].expand(-1, 24)):
        routing_ = route(index, 4)
        assert torch.equal(permute(x, routing_), permute(x.contiguous(), routing_))
    assert torch.equal(route(index.T.contiguous().T, 4).destinations, route(index, 4).destinations)


def test_a_broadcast_gradient_is_taken(backend):
    x = torch.randn(6, 10, device=DEVICE, requires_grad=True)
    index = choose(6, 2, 4).to(DEVICE)
    permute(x, route(index, 4)).sum().backward()
    assert x.grad.eq(2).all()


def test_gradcheck(backend):
    routing_ = route(choose(5, 2, 3, dropped=0.3).to(DEVICE), 3, alignment=8)
    x = torch.randn(5, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: unpermute(permute(x, routing_).sin(), routing_, w), (x, weights))


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("counts", [[[3, 0, 2], [1, 4, 0]], [[0]], [[0, 0], [0, 0], [0, 0]], [[7]], [[1, 2, 3, 4, 5]]])
def test_reorder_brings_chunks_by_expert(backend, counts, alignment):
    counts = torch.tensor(counts, device=DEVICE)
    labels = [(e, s) for s, of_source in enumerate(counts.tolist()) for e, n in enumerate(of_source) for _ in range(n)]
    spare = 2  # rows beyond the counts
    rows = torch.randn(len(labels) + spare, 5, device=DEVICE)
    moved, routing_ = reorder(rows, counts, alignment=alignment)
    _, offsets, totals = place(torch.tensor([[e] for e, _ in labels]).view(-1, 1), counts.size(1), alignment)
    assert routing_.offsets.tolist() == offsets
    assert routing_.counts.tolist() == totals == counts.sum(0).tolist()
    order = sorted(range(len(labels)), key=lambda row: labels[row])  # stable: a source's rows keep their order
    begin = [end - -(-n // alignment) * alignment for end, n in zip(offsets, totals, strict=True)]
    want = torch.zeros_like(moved)
    taken = dict.fromkeys(range(counts.size(1)), 0)
    for row in order:
        expert = labels[row][0]
        want[begin[expert] + taken[expert]] = rows[row]
        taken[expert] += 1
    assert torch.equal(moved, want)
    back = unpermute(moved, routing_)
    assert torch.equal(back[: len(labels)], rows[: len(labels)])
    assert back[len(labels) :].eq(0).all()


def test_the_same_bits_every_time(backend):
    index, weights = choose(64, 4, 8).to(DEVICE), torch.rand(64, 4, device=DEVICE)
    x = torch.randn(64, 96, device=DEVICE)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weights)]
        routing_ = route(index, 8)
        out = unpermute(permute(leaves[0], routing_).tanh(), routing_, leaves[1])
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("alignment", [1, 8])
def test_the_ops_are_registered_as_torch_asks(alignment):
    index = choose(7, 2, 4, dropped=0.2).to(DEVICE)
    routing_ = route(index, 4, alignment=alignment)
    x = torch.randn(7, 6, device=DEVICE, requires_grad=True)
    rows = torch.randn(routing_.rows, 6, device=DEVICE, requires_grad=True)
    weights = torch.rand(7, 2, device=DEVICE, requires_grad=True)
    opcheck(routing._route, (index, 4, alignment))
    opcheck(routing._route_by_counts, (torch.tensor([[2, 3]], device=DEVICE), 6, alignment))
    opcheck(memcpy._permute, (x, *routing_))
    opcheck(memcpy._unpermute, (rows, weights, *routing_[:3]))
    opcheck(memcpy._unpermute, (rows, None, *routing_[:3]))


def test_lengths_may_change_under_compile():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def there_and_back(x, index, weights):
        routing_ = route(index, 5)
        return unpermute(permute(x, routing_) * 2, routing_, weights)

    for tokens in (4, 9, 30):
        index, x = choose(tokens, 2, 5).to(DEVICE), torch.randn(tokens, 8, device=DEVICE, requires_grad=True)
        weights = torch.rand(tokens, 2, device=DEVICE, requires_grad=True)
        out = there_and_back(x, index, weights)
        torch.testing.assert_close(out, 2 * x * weights.sum(1, keepdim=True))
        out.sum().backward()
        torch.testing.assert_close(x.grad, (2 * weights.sum(1, keepdim=True)).expand_as(x))


def test_the_host_never_waits(monkeypatch):
    """On a GPU torch's own check; here nothing that needs a value on the host may be called."""
    index, x = choose(20, 2, 6).to(DEVICE), torch.randn(20, 16, device=DEVICE, requires_grad=True)
    weights, counts = torch.rand(20, 2, device=DEVICE, requires_grad=True), torch.ones(2, 10, device=DEVICE).long()

    def run():
        routing_ = route(index, 6, alignment=8)
        out = unpermute(permute(x, routing_), routing_, weights)
        torch.autograd.grad(out, (x, weights), x.detach())
        reorder(x.detach(), counts)

    run()  # compiles and tunes, which may wait
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    monkeypatch.setattr(routing, "runs_in_triton", lambda tensor: False)
    monkeypatch.setattr(memcpy, "runs_in_triton", lambda tensor: False)

    def refuse(self, *args, **kwargs):
        raise AssertionError("this waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    run()


def test_debug_mode_names_the_index(monkeypatch):
    monkeypatch.setattr(routing, "DEBUG", True)
    route(torch.tensor([[0, 3]], device=DEVICE), 3)  # the mark of an expert held elsewhere
    with pytest.raises(IndexError, match=r"`top_k_index\[1, 0\]` is 4, of 3 experts; .* in \[0, 3\), or 3 for"):
        route(torch.tensor([[0, 1], [4, -1]], device=DEVICE), 3)


def test_wrong_arguments_say_what_is_right():
    index = torch.zeros(4, 2, dtype=torch.long, device=DEVICE)
    routing_ = route(index, 3)
    with pytest.raises(ValueError, match=r"must be int32 or int64 of shape \(tokens, slots\), got torch.float32"):
        route(index.float(), 3)
    with pytest.raises(ValueError, match=r"of shape \(8,\)"):
        route(index.flatten(), 3)
    with pytest.raises(ValueError, match="`num_experts` must be at least 1, got 0"):
        route(index, 0)
    with pytest.raises(ValueError, match="`alignment` must be at least 1, got 0; 1 pads nothing"):
        route(index, 3, alignment=0)
    with pytest.raises(ValueError, match=r"`counts` must be int32 or int64 of shape \(sources, experts\)"):
        route_by_counts(index[0], 4)
    with pytest.raises(ValueError, match=r"`x` must have shape \(4, hidden\), a row for each token, got \(3, 5\)"):
        permute(torch.randn(3, 5, device=DEVICE), routing_)
    with pytest.raises(ValueError, match=r"`rows` must have shape \(8, hidden\), got \(7, 5\)"):
        unpermute(torch.randn(7, 5, device=DEVICE), routing_)
    with pytest.raises(ValueError, match=r"`weights` must have shape \(4, 2\), one for each slot, got \(8,\)"):
        unpermute(torch.randn(8, 5, device=DEVICE), routing_, torch.rand(8, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "hidden"), [(1000, 4, 16, 4096), (777, 8, 128, 2048), (513, 2, 8, 2880)]
)
def test_model_shapes(tokens, slots, experts, hidden, dtype):
    check_moves(choose(tokens, slots, experts, dropped=0.1), experts, hidden, dtype, weights_dtype=torch.float32)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    tokens, slots, experts, hidden = 70_001, 8, 16, 4096
    index = torch.rand(tokens, experts, device="cuda").argsort(1)[:, :slots]
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    routing_ = route(index, experts)
    rows = permute(x, routing_)
    assert rows.numel() > 2**31
    for token in (0, 35_000, tokens - 1):
        assert torch.equal(rows[routing_.destinations[token].long()], x[token].expand(slots, -1))
    assert torch.equal(rows[routing_.destinations.long().max()], x[(index == index.max()).any(1)][-1])
    weights = torch.full((tokens, slots), 1 / slots, device="cuda", requires_grad=True)
    rows.requires_grad_()
    out = unpermute(rows, routing_, weights)
    torch.testing.assert_close(out, x, rtol=0.02, atol=0.02)
    grad_rows, grad_weights = torch.autograd.grad(out, (rows, weights), x)
    torch.testing.assert_close(
        grad_weights, x.float().square().sum(1, keepdim=True).expand(-1, slots), rtol=1e-3, atol=1
    )
    for token in (0, tokens - 1):
        want = (x[token].float() / slots).bfloat16().expand(slots, -1)
        assert torch.equal(grad_rows[routing_.destinations[token].long()], want)
