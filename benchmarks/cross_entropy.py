"""The sum of rows' cross-entropies and its gradient: our kernels beside torch's compiler, Liger-Kernel and QuACK.

A time is taken only where, in the same run, the sum agrees with float64 to 2e-3 and its gradient by norm to 6e-3,
which is bfloat16's rounding: Liger's sum is of that type, the others' of float32. Otherwise `status` says how far they
are, or what was raised. Times are the device's, calls queued one behind the other; a contender that waits for the
device itself cannot be queued. `gb_per_s` counts the bytes that no method can save: the forward reads the logits, the
backward reads and writes them.

    python -m benchmarks.cross_entropy                                  all shapes, writes a CSV
    python -m benchmarks.cross_entropy --tiny --output /tmp/tiny.csv    on the CPU: a test of this program
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.contest import Contest
from otpo_kernels.cross_entropy import IGNORED, cross_entropy

LOSS_GATE, GRADIENT_GATE = 2e-3, 6e-3
SHAPES = {"compass-small": (16384, 32_000), "qwen3": (8192, 151_936), "compass-v3": (8192, 180_000)}
"""Rows and words."""
TINY = {"tiny": (24, 50)}
COLUMNS = ("shape", "rows", "words", "contender", "status", "loss_error", "gradient_error")
COLUMNS += ("forward_ms", "backward_ms", "forward_gb_per_s", "backward_gb_per_s")
SumOfLosses = Callable[[Tensor, Tensor], Tensor]


def ours(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels).sum()


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    """torch's own function on a float32 copy, which is what transformers' loss does."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def compiled(**options: Any) -> SumOfLosses:
    """[`plain`] by torch's compiler, made at the first call."""
    make = functools.cache(lambda: torch.compile(plain, options=options or None, dynamic=False))
    return lambda logits, labels: make()(logits, labels)


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    """Its forward writes the gradient over the logits, so that later calls get other numbers than the first."""
    from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]

    return functional.liger_cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy as of_quack  # pyright: ignore[reportMissingImports]

    return of_quack(logits, labels, ignore_index=IGNORED, reduction="sum")


CONTENDERS: dict[str, SumOfLosses] = {
    "ours": ours,
    "torch": plain,
    "torch compiled": compiled(),
    "torch compiled, tuned": compiled(coordinate_descent_tuning=True, online_softmax=False),
    "liger": liger,
    "quack": quack,
}


class Problem(NamedTuple):
    """bfloat16 logits `(N, V)`, float32 on the CPU, and labels `(N,)`, of which every seventh row has none."""

    logits: Tensor
    labels: Tensor


def make_problem(rows: int, words: int, device: torch.device) -> Problem:
    draw = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(rows, words, generator=draw, device=device)
    labels = torch.randint(0, words, (rows,), generator=draw, device=device)
    labels[::7] = IGNORED
    return Problem(logits.to(torch.bfloat16 if device.type == "cuda" else torch.float32), labels)


def errors_of(sum_of: SumOfLosses, problem: Problem) -> tuple[float, float]:
    """How far the sum and its gradient are from float64's, relative, over all rows; NaN where either is no number."""
    leaf = problem.logits.clone().requires_grad_()
    loss = sum_of(leaf * 1, problem.labels)  # a copy, which a contender may write over
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.125))
    want, off, size = 0.0, 0.0, 0.0
    for logits, labels, got in zip(*(each.split(512) for each in (*problem, gradient)), strict=True):
        exact = logits.double().requires_grad_()
        part = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum")
        (of_logits,) = torch.autograd.grad(part, exact, torch.full_like(part, 0.125))
        want += part.item()
        off += (got.double() - of_logits).square().sum().item()
        size += of_logits.square().sum().item()
    return abs(loss.item() / want - 1), (off / size) ** 0.5


def times_of(sum_of: SumOfLosses, problem: Problem) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward."""
    leaf = problem.logits.clone().requires_grad_()
    grad = torch.full((), 0.125, device=leaf.device)
    if not leaf.is_cuda:
        started = time.perf_counter()
        loss = sum_of(leaf * 1, problem.labels)
        middle = time.perf_counter()
        torch.autograd.grad(loss, leaf, grad)
        return 1e3 * (middle - started), 1e3 * (time.perf_counter() - middle)
    forward = harness.measure_device(lambda: sum_of(leaf, problem.labels)).ms
    whole = harness.measure_device(lambda: torch.autograd.grad(sum_of(leaf, problem.labels), leaf, grad)).ms
    return forward, whole - forward


def measure(shape: str, name: str, problem: Problem) -> dict[str, Any]:
    """A row of the CSV."""
    rows, words = problem.logits.shape
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"shape": shape, "rows": rows, "words": words, "contender": name}
    try:
        loss_error, gradient_error = errors_of(CONTENDERS[name], problem)
        row |= {"loss_error": f"{loss_error:.1e}", "gradient_error": f"{gradient_error:.1e}"}
        if not (loss_error <= LOSS_GATE and gradient_error <= GRADIENT_GATE):
            return row | {"status": f"wrong: the sum is off by {loss_error:.1e}, its gradient by {gradient_error:.1e}"}
        forward, backward = times_of(CONTENDERS[name], problem)
    except Exception as error:  # a contender that isn't installed, or finds no memory, has no time
        return row | {"status": harness.reason(error)}
    size = problem.logits.nbytes / 1e6
    row |= {"status": "ok", "forward_ms": round(forward, 4), "backward_ms": round(backward, 4)}
    return row | {"forward_gb_per_s": round(size / forward), "backward_gb_per_s": round(2 * size / backward)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the arguments ask for; 1 where `ours` has no time."""
    packages = ("liger-kernel", "quack-kernels")
    told = "{forward_ms} and {backward_ms} ms".format_map
    contest = Contest(
        "cross_entropy", __doc__, SHAPES, TINY, CONTENDERS, "ours", make_problem, measure, told, packages
    )
    return contest.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
