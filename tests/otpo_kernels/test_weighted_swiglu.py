"""SwiGLU times routers' weights against autograd in float64, by kernels and by plain torch.

On the CPU Triton's interpreter runs the kernels; on a GPU they are compiled.
"""

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton", reason="triton is made for Linux")
from operator_helpers import DEVICE, assert_close, backends

from otpo_kernels import weighted_swiglu as module
from otpo_kernels.routing import route
from otpo_kernels.weighted_swiglu import run_weighted_swiglu_backward, sources_of_rows, weighted_swiglu

# tokens, slots, F, share of slots that go nowhere, alignment: odd tiles, wide rows, padding, no slot, one row, none
backend = backends(module)

SIZES = [
    (37, 3, 24, 0.0, 1),
    (65, 2, 70, 0.3, 1),
    (9, 1, 600, 0.0, 1),
    (20, 2, 16, 0.2, 8),
    (7, 2, 8, 1.0, 1),
    (1, 1, 1, 0.0, 1),
    (0, 2, 8, 0.0, 1),
]
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EXPERTS = 5


def make_case(tokens, slots, width, absent, alignment, dtype=torch.float32, nothing=float("nan")):
    """`h` and a gradient, whose rows of no slot hold what a product may leave there; weights; the routing."""
    index = torch.rand(tokens, EXPERTS).argsort(1)[:, :slots]
    index = index.masked_fill(torch.rand(tokens, slots) < absent, EXPERTS)
    routing = route(index.to(DEVICE), EXPERTS, alignment=alignment)
    empty = sources_of_rows(routing.destinations, routing.rows).cpu() < 0
    h, grad, weights = (
        torch.randn(routing.rows, 2 * width),
        torch.randn(routing.rows, width),
        torch.rand(tokens, slots),
    )
    h[empty], grad[empty] = nothing, nothing
    return h.to(DEVICE, dtype), weights.to(DEVICE, dtype), routing, grad.to(DEVICE, dtype)


def definition(h, weights, routing, grad):
    """Value and gradients by autograd in float64, from a loop over slots; zero for rows and slots that have none."""
    h, weights = (tensor.cpu().double().requires_grad_() for tensor in (h, weights))
    value, sums = torch.zeros(grad.shape).double(), torch.zeros(()).double()
    for (token, slot), row in zip(
        torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist(),
        routing.destinations.flatten().tolist(),
        strict=True,
    ):
        if row >= 0:
            gate, up = h[row].chunk(2)
            of_row = weights[token, slot] * gate / (1 + torch.exp(-gate)) * up
            value[row] = of_row.detach()
            sums = sums + of_row @ grad[row].cpu().double()
    if not sums.requires_grad:
        return value, torch.zeros_like(h), torch.zeros_like(weights)
    return value, *torch.autograd.grad(sums, (h, weights))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients(sizes, dtype, backend):
    """Also where rows of no slot, and their gradients, are not numbers."""
    h, weights, routing, grad = make_case(*sizes, dtype)
    leaves = h.clone().requires_grad_(), weights.clone().requires_grad_()
    value = weighted_swiglu(*leaves, routing)
    got = (value, *torch.autograd.grad(value, leaves, grad))
    assert all(each.dtype == dtype and each.is_contiguous() for each in got)
    # A weight's gradient sums a row of products, which may cancel.
    wide = CLOSE[dtype] * sizes[2] ** 0.5
    for each, want, tolerance in zip(
        got, definition(h, weights, routing, grad), (CLOSE[dtype], CLOSE[dtype], wide), strict=True
    ):
        assert_close(each, want, tolerance)


def test_a_weight_of_zero_still_learns(backend):
    h, weights, routing, grad = make_case(12, 2, 8, 0.0, 1)
    weights = torch.zeros_like(weights).requires_grad_()
    value = weighted_swiglu(h, weights, routing)
    (of_weights,) = torch.autograd.grad(value, weights, grad)
    assert not value.any() and of_weights.all()
    assert_close(of_weights, definition(h, weights, routing, grad)[2], 1e-5)


@pytest.mark.parametrize("of_weights", CLOSE, ids=str)
@pytest.mark.parametrize("of_rows", CLOSE, ids=str)
def test_rows_and_weights_of_two_types(of_rows, of_weights, backend):
    h, weights, routing, grad = make_case(*SIZES[1])
    leaves = h.to(of_rows).requires_grad_(), weights.to(of_weights).requires_grad_()
    value = weighted_swiglu(*leaves, routing)
    got = (value, *torch.autograd.grad(value, leaves, grad.to(of_rows)))
    assert [each.dtype for each in got] == [of_rows, of_rows, of_weights]
    rows, wide = CLOSE[of_rows], 10 * max(CLOSE[of_rows], CLOSE[of_weights])  # it sums 70 products
    want = definition(leaves[0].detach(), leaves[1].detach(), routing, grad.to(of_rows))
    for each, exact, tolerance in zip(got, want, (rows, rows, wide), strict=True):
        assert_close(each, exact, tolerance)


def test_strided_tensors(backend):
    h, weights, routing, grad = make_case(*SIZES[0])
    leaves = h.t().contiguous().t().requires_grad_(), weights.t().contiguous().t().requires_grad_()
    grad = grad[:1, :1].expand(*grad.shape)
    got = torch.autograd.grad(weighted_swiglu(*leaves, routing), leaves, grad)
    for each, want in zip(got, definition(h, weights, routing, grad)[1:], strict=True):
        assert_close(each, want, 2e-5)


@pytest.mark.parametrize("value", [False, True])
def test_the_backward_computes_the_value_on_demand(value, backend):
    h, weights, routing, grad = make_case(*SIZES[1])
    sources = sources_of_rows(routing.destinations, routing.rows)
    *_, a = run_weighted_swiglu_backward(grad, h, weights, sources, value=value)
    if value:
        assert torch.equal(a, weighted_swiglu(h, weights, routing))
    else:
        assert a.shape == (0, grad.size(1))


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[3]], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_operators_are_ones_that_torch_can_compile(backend, strided, sizes):
    h, weights, routing, _ = make_case(*sizes, nothing=0.0)
    sources = sources_of_rows(routing.destinations, routing.rows)
    h = h.t().contiguous().t() if strided else h
    opcheck(torch.ops.otpo.weighted_swiglu.default, (h.requires_grad_(), weights.requires_grad_(), sources))
    opcheck(torch.ops.otpo.sources_of_rows.default, (routing.destinations, routing.rows))


def test_compiled_in_one_graph_with_any_number_of_rows(backend):
    torch._dynamo.reset()

    def layer(h, weights, index):
        return weighted_swiglu(2 * h, weights, route(index, EXPERTS)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 15):
        index = torch.rand(tokens, EXPERTS, device=DEVICE).argsort(1)[:, :2]
        h, weights = torch.randn(2 * tokens, 16, device=DEVICE), torch.rand(tokens, 2, device=DEVICE)
        leaves = h.requires_grad_(), weights.requires_grad_()
        grad = torch.randn(2 * tokens, 8, device=DEVICE)
        got, want = (torch.autograd.grad(function(*leaves, index), leaves, grad) for function in (compiled, layer))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_rows_know_their_slots(backend):
    index = torch.tensor([[2, 0], [3, 2], [0, 1]], device=DEVICE)  # 3 is held elsewhere
    assert sources_of_rows(route(index, 3).destinations, 6).tolist() == [1, 4, 5, 0, 3, -1]
    destinations = route(torch.randint(0, 6, (90, 3), device=DEVICE), 5).destinations
    got = sources_of_rows(destinations, destinations.numel())
    for row, slot in enumerate(got.tolist()):
        assert slot == -1 or destinations.flatten()[slot] == row
    assert (got >= 0).sum() == (destinations >= 0).sum()


def test_arguments_that_do_not_fit_are_named():
    _, weights, routing, _ = make_case(4, 2, 8, 0.0, 1)
    for h, given in (((8, 7), weights), ((8,), weights), ((7, 16), weights), ((8, 16), weights.T)):
        with pytest.raises(ValueError, match=r"must have shape .* got"):
            weighted_swiglu(torch.zeros(h, device=DEVICE), given, routing)
    with pytest.raises(ValueError, match="one device"):
        weighted_swiglu(torch.zeros(8, 16, device="meta"), weights, routing)
