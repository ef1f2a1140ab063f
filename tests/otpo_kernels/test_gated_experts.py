"""Layers of gated experts against autograd through loops in float64, kernels and plain torch.

On the CPU Triton's interpreter runs the kernels; on a GPU they are compiled, in bfloat16.
"""

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton", reason="triton is made for Linux")
from otpo_kernels import memcpy, routing, swiglu, weighted_swiglu
from otpo_kernels.gated_experts import gated_experts
from otpo_kernels.memcpy import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-5
NAMES = ("x", "gate_up", "down", "weights")
# tokens, slots, experts, D, F: groups of several tiles, odd ones, experts without rows, one token, none, wide rows
SIZES = [
    (37, 3, 5, 40, 24),
    (70, 2, 4, 16, 48),
    (5, 2, 9, 24, 8),
    (1, 1, 3, 8, 16),
    (0, 2, 3, 16, 8),
    (33, 1, 1, 32, 16),
]


@pytest.fixture
def plain_torch(monkeypatch):
    for module in (routing, memcpy, swiglu, weighted_swiglu):
        monkeypatch.setattr(module, "runs_in_triton", lambda tensor: False)


def make_case(tokens, slots, experts, hidden, width, absent=0.0):
    """Inputs, the experts of each slot (`experts` for one held elsewhere), and the output's gradient."""
    index = torch.rand(tokens, max(experts, slots)).argsort(1)[:, :slots] % experts
    index = torch.where(torch.rand(tokens, slots) < absent, experts, index)
    shapes = ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width), (tokens, slots))
    inputs = [torch.randn(shape).div(shape[-1] ** 0.5 if len(shape) == 3 else 1.0) for shape in shapes]
    grad = torch.randn(tokens, hidden)
    return [t.to(DEVICE, DTYPE) for t in inputs], index.to(DEVICE), grad.to(DEVICE, DTYPE)


def by_loops(x, gate_up, down, weights, index):
    """The layer's definition, a slot at a time."""
    output = 0 * x
    for token, slot in (index < len(gate_up)).nonzero().tolist():
        expert = index[token, slot]
        gate, up = (gate_up[expert] @ x[token]).chunk(2)
        row = down[expert] @ (torch.nn.functional.silu(gate) * up)
        output = (
            output + torch.nn.functional.one_hot(torch.tensor(token), len(x))[:, None] * weights[token, slot] * row
        )
    return output


def check(inputs, index, grad):
    """Output and each gradient by name against loops in float64."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    output = gated_experts(*leaves[:3], route(index, len(inputs[1])), leaves[3])
    got = torch.autograd.grad(output, leaves, grad)
    exact = [t.cpu().double().requires_grad_() for t in inputs]
    want_output = by_loops(*exact, index.cpu())
    want = torch.autograd.grad(want_output, exact, grad.cpu().double(), allow_unused=True)
    for name, value, expected in zip(("output", *NAMES), (output, *got), (want_output, *want), strict=True):
        assert value.dtype == DTYPE and value.is_contiguous(), name
        expected = torch.zeros_like(value, device="cpu").double() if expected is None else expected
        error = (value.cpu().double() - expected).norm()
        assert error <= TOLERANCE * (expected.norm() + 1e-6), f"{name}: {error} of {expected.norm()}"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients(sizes):
    check(*make_case(*sizes))


@pytest.mark.parametrize("absent", [0.4, 1.0])
def test_experts_held_elsewhere_add_nothing(absent):
    check(*make_case(23, 3, 4, 24, 16, absent=absent))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plain_torch(sizes, plain_torch):
    if DEVICE == "cuda":
        pytest.skip("a GPU always has the kernels")
    check(*make_case(*sizes, absent=0.2))


def test_frozen_experts_get_no_gradient():
    inputs, index, grad = make_case(*SIZES[0])
    plan = route(index, len(inputs[1]))
    leaves = [t.clone().requires_grad_() for t in inputs]
    want = torch.autograd.grad(gated_experts(*leaves[:3], plan, leaves[3]), leaves, grad)
    x, weights = (inputs[i].clone().requires_grad_() for i in (0, 3))
    output = gated_experts(x, *inputs[1:3], plan, weights)
    got = torch.autograd.grad(output, (x, weights), grad)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[3])


def test_strided_rows_and_gradients():
    inputs, index, grad = make_case(*SIZES[0])
    check([inputs[0].t().contiguous().t(), *inputs[1:]], index, grad[:1, :1].expand(*grad.shape))


def test_weights_keep_their_dtype():
    inputs, index, grad = make_case(*SIZES[0])
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[DTYPE]
    weights = inputs[3].to(other).requires_grad_()
    output = gated_experts(*inputs[:3], route(index, 5), weights)
    (got,) = torch.autograd.grad(output, weights, grad)
    assert output.dtype == DTYPE and got.dtype == weights.dtype and got.any()


def test_what_is_kept_for_the_backward():
    """x, the parameters, h and the routing: no gathered rows, no experts' outputs."""
    inputs, index, _ = make_case(*SIZES[0])
    leaves = [t.requires_grad_() for t in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_experts(*leaves[:3], route(index, 5), leaves[3])
    rows = index.numel()
    large = [tuple(t.shape) for t in kept if len(t) == rows]
    assert large == [(rows, 2 * 24)]


@pytest.mark.parametrize("keeps", [False, True])
def test_without_gradients_nothing_is_kept(keeps):
    inputs, index, _ = make_case(*SIZES[0])
    plan = route(index, 5)
    output, h = torch.ops.otpo.gated_experts(*inputs, *plan[:3], keeps)
    assert h.shape == (index.numel() if keeps else 0, 2 * 24)
    with torch.no_grad():
        assert torch.equal(gated_experts(*inputs[:3], plan, inputs[3]), output)


def test_operator_is_sound():
    inputs, index, _ = make_case(*SIZES[2])
    leaves = [t.requires_grad_() for t in inputs]
    plan = route(index, len(inputs[1]))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(torch.ops.otpo.gated_experts, (*leaves, *plan[:3], True), test_utils=checks)


def test_compiles_without_a_break():
    inputs, index, grad = make_case(*SIZES[0])

    def layer(x, gate_up, down, weights):
        return gated_experts(x, gate_up, down, route(index, 5), weights)

    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        output = call(*leaves)
        found.append((output, *torch.autograd.grad(output, leaves, grad)))
    for name, eager, compiled in zip(("output", *NAMES), *found, strict=True):
        torch.testing.assert_close(compiled, eager, msg=name)


def test_what_does_not_fit_is_named():
    inputs, index, _ = make_case(*SIZES[0])
    x, gate_up, down, weights = inputs
    plan = route(index, 5)
    with pytest.raises(ValueError, match="ask for"):
        gated_experts(x, gate_up, down.transpose(1, 2), plan, weights)
    with pytest.raises(ValueError, match="alignment=1"):
        gated_experts(x, gate_up, down, route(index, 5, alignment=8), weights)
    with pytest.raises(TypeError, match="share a dtype"):
        gated_experts(x, gate_up, down.half(), plan, weights)
