"""Cross-entropies of rows against autograd in float64, by kernels and by plain torch.

On the CPU Triton's interpreter runs the kernels; on a GPU they are compiled.
"""

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton", reason="triton is made for Linux")
from operator_helpers import DEVICE, assert_close, backends

from otpo_kernels import cross_entropy as module
from otpo_kernels.cross_entropy import cross_entropy

backend = backends(module)

# rows and words: several blocks and a part of one, whole blocks, fewer words than a block, one word, one row, no row
SIZES = [(7, 75), (4, 64), (5, 13), (3, 1), (1, 100), (0, 40)]
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make_case(rows, words, dtype=torch.float32):
    """Logits, labels of which every third row has none, and a gradient for each row."""
    logits, grad = 4 * torch.randn(rows, words), torch.randn(rows)
    labels = torch.randint(0, words, (rows,))
    labels[1::3] = -100
    return logits.to(DEVICE, dtype), labels.to(DEVICE), grad.to(DEVICE)


def definition(logits, labels, grad):
    """Losses and gradient by autograd in float64."""
    logits = logits.cpu().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits, labels.cpu(), reduction="none", ignore_index=-100)
    return losses.detach(), torch.autograd.grad(losses, logits, grad.cpu().double())[0]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_and_gradient(sizes, dtype, backend):
    logits, labels, grad = make_case(*sizes, dtype)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, labels)
    (of_logits,) = torch.autograd.grad(losses, leaf, grad.to(losses.dtype))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert of_logits.dtype == dtype and of_logits.is_contiguous()
    want, of_want = definition(logits, labels, grad)
    assert_close(losses, want, min(CLOSE[dtype], 2e-6))  # sums are of float32, whatever the logits are
    assert_close(of_logits, of_want, CLOSE[dtype])


def test_a_sum_s_gradient_is_one_number_for_all_rows(backend):
    logits, labels, _ = make_case(7, 75)
    leaf = logits.clone().requires_grad_()
    (of_logits,) = torch.autograd.grad(cross_entropy(leaf, labels).sum() / 5, leaf)
    assert_close(of_logits, definition(logits, labels, torch.full((7,), 0.2))[1], 1e-6)


def test_strided_logits_labels_and_gradients(backend):
    logits, labels, grad = make_case(7, 75)
    leaf = logits.t().contiguous().t().requires_grad_()
    losses = cross_entropy(leaf, torch.stack([labels, labels + 1], 1)[:, 0])
    (of_logits,) = torch.autograd.grad(losses, leaf, torch.stack([grad, grad], 1)[:, 1])
    for got, want in zip((losses, of_logits), definition(logits, labels, grad), strict=True):
        assert_close(got, want, 2e-6)


def test_rows_without_a_label_count_for_nothing_whatever_they_hold(backend):
    logits, labels, grad = make_case(7, 75)
    logits[1], logits[4], grad[1] = float("nan"), float("inf"), float("nan")
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, labels)
    (of_logits,) = torch.autograd.grad(losses, leaf, grad)
    assert not losses[1::3].any() and not of_logits[1::3].any()
    assert losses.isfinite().all() and of_logits.isfinite().all()


@pytest.mark.parametrize("words", [range(40), range(40, 75), [3]], ids=["first blocks", "last block", "one"])
def test_impossible_words(words, backend):
    """Logits of minus infinity, a whole block of them before or after the others."""
    logits, labels, grad = make_case(7, 75)
    logits[:, list(words)] = -float("inf")
    labels = torch.where(labels >= 0, next(word for word in range(75) if word not in words), labels)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, labels)
    (of_logits,) = torch.autograd.grad(losses, leaf, grad)
    for got, want in zip((losses, of_logits), definition(logits, labels, grad), strict=True):
        assert_close(got, want, 2e-6)


@pytest.mark.parametrize("case", ["nan", "inf", "inf at the label", "-inf at the label", "-inf everywhere"])
def test_what_is_no_number_is_torch_s(case, backend):
    """The row's loss and its gradient; other rows do not notice."""
    logits, labels, grad = make_case(7, 75)
    labels[3] = 12
    words = {"label": 12, "everywhere": slice(None)}.get(case.split()[-1], 70)
    logits[3, words] = float(case.split()[0])
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, labels)
    (of_logits,) = torch.autograd.grad(losses, leaf, grad)
    want, of_want = definition(logits, labels, grad)
    torch.testing.assert_close(losses.cpu().double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(of_logits.cpu().double(), of_want, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert not losses[3].isfinite() and losses[:3].isfinite().all()


def test_large_logits_and_a_sure_word(backend):
    logits = torch.tensor([[3e4, 0.0, -3e4], [3e4, 3e4, 0.0]], device=DEVICE, requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([0, 1], device=DEVICE))
    (of_logits,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.0, 0.693359375]), atol=2e-3, rtol=0)
    torch.testing.assert_close(of_logits.cpu(), torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0]]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("label", [75, -1, -7])
def test_a_label_outside_the_vocabulary_is_not_taken_for_another(label, backend):
    logits, labels, _ = make_case(7, 75)
    labels[2] = label
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, labels)
    (of_logits,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.isnan().tolist() == [row == 2 for row in range(7)]
    assert of_logits.isnan().all(dim=1).tolist() == [row == 2 for row in range(7)]


@pytest.mark.parametrize("sizes", [(7, 75), (3, 1)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_operator_is_one_that_torch_can_compile(backend, strided, sizes):
    logits, labels, _ = make_case(*sizes)
    logits = logits.t().contiguous().t() if strided else logits
    opcheck(torch.ops.otpo.cross_entropy.default, (logits.requires_grad_(), labels))


def test_compiled_in_one_graph_with_any_number_of_rows(backend):
    torch._dynamo.reset()
    head = torch.compile(
        lambda x, labels: cross_entropy(2 * x, labels).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (6, 11):
        logits, labels, _ = make_case(rows, 40)
        leaf = logits.clone().requires_grad_()
        (of_logits,) = torch.autograd.grad(head(leaf, labels), leaf)
        losses, gradient = definition(2 * logits, labels, torch.ones(rows))
        torch.testing.assert_close(head(logits, labels).cpu().double(), losses.sum(), rtol=1e-6, atol=1e-6)
        assert_close(of_logits, 2 * gradient, 2e-6)


@pytest.mark.parametrize(
    ("logits", "labels"), [((4, 7), (3,)), ((4,), (4,)), ((2, 4, 7), (2, 4)), ((4, 0), (4,))], ids=str
)
def test_shapes_that_do_not_fit_are_named(logits, labels):
    with pytest.raises(ValueError, match=r"must have shape .* got"):
        cross_entropy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_types_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"int64.*int32"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32))
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"bfloat16.*" + str(dtype)):
            cross_entropy(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(37, 32_000), (9, 151_936), (5, 4097), (3, 4095)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_whole_vocabularies(sizes, dtype):
    logits, labels, grad = make_case(*sizes, dtype)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, labels)
    (of_logits,) = torch.autograd.grad(losses, leaf, grad)
    want, of_want = definition(logits, labels, grad)
    assert_close(losses, want, 2e-6)
    close = 2e-6 if dtype == torch.float32 else 4e-3
    assert (of_logits.cpu().double() - of_want).norm() <= close * of_want.norm()


@pytest.mark.gpu
def test_more_logits_than_32_bits_count():
    rows, words = 16_500, 131_072
    logits = torch.randn(rows, words, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, words, (rows,), device="cuda")
    losses = cross_entropy(logits, labels)
    (of_logits,) = torch.autograd.grad(losses.sum(), logits)
    for part in (slice(0, 3), slice(rows - 3, rows)):
        want, of_want = definition(logits.detach()[part], labels[part], torch.ones(3))
        assert_close(losses[part], want, 2e-6)
        assert (of_logits[part].cpu().double() - of_want).norm() <= 4e-3 * of_want.norm()
