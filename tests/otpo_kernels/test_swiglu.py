"""SwiGLU of grouped rows against autograd in float64, by kernels and by plain torch.

On the CPU Triton's interpreter runs the kernels; on a GPU they are compiled.
"""

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton", reason="triton is made for Linux")
from operator_helpers import DEVICE, assert_close, backends

from otpo_kernels import swiglu as module
from otpo_kernels.swiglu import swiglu, swiglu_backward_reference, swiglu_reference

backend = backends(module)

# rows, F, and the groups' ends: odd tiles, wide rows, groups without rows, rows after the last group, one row, none
SIZES = [
    (37, 24, (5, 5, 37)),
    (130, 70, (0, 64, 129, 130)),
    (9, 600, (9,)),
    (20, 16, (3, 11)),
    (7, 8, (0, 0)),
    (1, 1, (1,)),
    (0, 8, (0, 0)),
]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make_case(rows, width, ends, dtype=torch.float32, nothing=float("nan")):
    """`h`, whose rows after the last group hold what a grouped product may leave there, its ends, and a gradient."""
    h, grad = torch.randn(rows, 2 * width), torch.randn(rows, width)
    h[ends[-1] :], grad[ends[-1] :] = nothing, nothing
    return h.to(DEVICE, dtype), torch.tensor(ends, dtype=torch.int32, device=DEVICE), grad.to(DEVICE, dtype)


def definition(h, ends, grad):
    """Value and gradient by autograd in float64, a group's rows at a time; zero elsewhere."""
    h = h.cpu().double().requires_grad_()
    gate, up = h[: int(ends[-1])].chunk(2, dim=-1)
    value = gate / (1 + torch.exp(-gate)) * up
    (of_h,) = torch.autograd.grad(value, h, grad.cpu().double()[: len(value)])
    return torch.cat([value.detach(), torch.zeros(len(h) - len(value), value.size(1)).double()]), of_h


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradient(sizes, dtype, backend):
    """Also where rows after the last group, and their gradients, are not numbers."""
    h, ends, grad = make_case(*sizes, dtype)
    leaf = h.clone().requires_grad_()
    value = swiglu(leaf, ends)
    (of_h,) = torch.autograd.grad(value, leaf, grad)
    assert value.dtype == of_h.dtype == dtype and value.is_contiguous() and of_h.is_contiguous()
    for got, want in zip((value, of_h), definition(h, ends, grad), strict=True):
        assert_close(got, want, CLOSE[dtype])


def test_large_numbers_of_the_gate_saturate(backend):
    h = torch.tensor([[-200.0, 200.0, 3.0, 3.0], [0.0, -0.0, 2.0, -2.0]], device=DEVICE, requires_grad=True)
    value = swiglu(h, torch.tensor([2], device=DEVICE))
    (of_h,) = torch.autograd.grad(value.sum(), h)
    assert value.tolist() == [[0.0, 600.0], [0.0, 0.0]]
    assert of_h.tolist() == [[0.0, 3.0, 0.0, 200.0], [1.0, -1.0, 0.0, 0.0]]


def test_strided_rows_and_gradients(backend):
    h, ends, grad = make_case(*SIZES[0])
    leaf = h.t().contiguous().t().requires_grad_()
    (of_h,) = torch.autograd.grad(swiglu(leaf, ends), leaf, grad[:1, :1].expand(*grad.shape))
    assert_close(of_h, definition(h, ends, grad[:1, :1].expand(*grad.shape))[1], CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_plain_torch_has_the_bits_of_torch_s_own_operations(dtype):
    """In float32 and float64, so that a training on the CPU is what it was without the operator."""
    h, ends, grad = (t.cpu() for t in make_case(30, 16, (30,), dtype))
    leaf = h.clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up
    assert torch.equal(swiglu_reference(h, ends), want)
    assert torch.equal(swiglu_backward_reference(grad, h, ends), torch.autograd.grad(want, leaf, grad)[0])


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[3]], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_operator_is_one_that_torch_can_compile(backend, strided, sizes):
    h, ends, _ = make_case(*sizes, nothing=0.0)
    opcheck(torch.ops.otpo.swiglu.default, ((h.t().contiguous().t() if strided else h).requires_grad_(), ends))


def test_ends_may_be_strided(backend):
    """As a column of a table is."""
    h, _, grad = make_case(6, 8, (6,))
    ends = torch.tensor([[2, 1], [6, 0]], dtype=torch.int32, device=DEVICE)[:, 0]
    leaf = h.clone().requires_grad_()
    value = swiglu(leaf, ends)
    for got, want in zip((value, torch.autograd.grad(value, leaf, grad)[0]), definition(h, ends, grad), strict=True):
        assert_close(got, want, CLOSE[torch.float32])


def test_compiled_in_one_graph_with_any_number_of_rows(backend):
    torch._dynamo.reset()
    layer = torch.compile(lambda h, ends: swiglu(2 * h, ends) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (12, 30):
        h, ends, grad = make_case(rows, 8, (rows // 2, rows))
        leaf = h.clone().requires_grad_()
        (of_h,) = torch.autograd.grad(layer(leaf, ends), leaf, grad)
        value, gradient = definition(2 * h, ends, grad)
        assert_close(layer(h, ends), value + 1, CLOSE[torch.float32])
        assert_close(of_h, 2 * gradient, CLOSE[torch.float32])


@pytest.mark.parametrize(("h", "ends"), [((4, 7), (2,)), ((4,), (2,)), ((4, 6), (0,)), ((4, 6), (2, 1))])
def test_shapes_that_do_not_fit_are_named(h, ends):
    with pytest.raises(ValueError, match=r"must have shape .* got"):
        swiglu(torch.zeros(h), torch.zeros(ends, dtype=torch.int32))
