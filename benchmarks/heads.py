"""A language head with its loss: `otpo pretrain`'s ways beside Liger-Kernel's fused head, time and memory of a step.

A row is the head's product, the sum of cross-entropies, and the gradients of states and weights. It has a time only
where, in the same run, the sum agrees with float64 losses of float32 products to 2e-3 and both gradients by norm to
2e-2, which is what bfloat16 rounds; otherwise `status` says how far they are, or what was raised. Times are the
device's, calls queued one behind the other; a contender that waits for the device itself cannot be queued. `peak_mib`
is beyond states, weights and what was there.

    python -m benchmarks.heads                                  all shapes, writes a CSV
    python -m benchmarks.heads --tiny --output /tmp/tiny.csv    on the CPU: a test of this program
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.contest import Contest
from benchmarks.cross_entropy import plain
from moe_backbone.pretraining.token_losses import chunked_loss, kernel_loss
from otpo_kernels.cross_entropy import IGNORED

LOSS_GATE, GRADIENT_GATE = 2e-3, 2e-2
SHAPES = {
    "compass-small": (16384, 1024, 32_000),
    "qwen3-1.7b": (8192, 2048, 151_936),
    "compass-v3": (8192, 8192, 180_000),
}
"""Tokens, hidden size, words."""
TINY = {"tiny": (24, 16, 50)}
COLUMNS = ("shape", "tokens", "hidden", "words", "contender", "status", "loss_error", "states_error", "weights_error")
COLUMNS += ("ms", "peak_mib", "first_call_s")


class Problem(NamedTuple):
    """States `(1, T, H)`, a head with weights `(V, H)` and labels `(1, T)`, of which every seventh has none.

    bfloat16 on a GPU, float32 on the CPU. A float32 copy of the logits would be 2 to 6 GB.
    """

    states: Tensor
    head: nn.Linear
    labels: Tensor


SumOfLosses = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def logits(head: nn.Linear, states: Tensor, labels: Tensor) -> Tensor:
    """transformers' way: the head's logits in float32, and torch's own function."""
    return plain(head(states).flatten(0, 1), labels.flatten())


def liger(head: nn.Linear, states: Tensor, labels: Tensor) -> Tensor:
    """Liger-Kernel's fused head, which computes its gradients in the forward, a part of the tokens at a time."""
    from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]

    return functional.liger_fused_linear_cross_entropy(
        states.flatten(0, 1), head.weight, labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


CONTENDERS: dict[str, SumOfLosses] = {
    "kernel": lambda head, states, labels: kernel_loss(head, states, labels, detach=False),
    "chunked": lambda head, states, labels: chunked_loss(head, states, labels, detach=False),
    "logits": logits,
    "liger": liger,
}
"""The first three are those of `token_loss`; `chunked` is TRL's head."""


def make_problem(tokens: int, hidden: int, words: int, device: torch.device) -> Problem:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    states = torch.randn(1, tokens, hidden, device=device).to(dtype).requires_grad_()
    head = nn.Linear(hidden, words, bias=False, device=device, dtype=dtype)
    nn.init.normal_(head.weight, std=hidden**-0.5)
    labels = torch.randint(0, words, (1, tokens), device=device)
    labels[:, ::7] = IGNORED
    return Problem(states, head, labels)


def step(sum_of: SumOfLosses, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of losses over the number of tokens, and its gradients by states and by weights."""
    loss = sum_of(problem.head, problem.states, problem.labels) / problem.labels.numel()
    return loss.detach(), *torch.autograd.grad(loss, (problem.states, problem.head.weight))


def errors_of(found: tuple[Tensor, Tensor, Tensor], problem: Problem) -> tuple[float, float, float]:
    """How far what [`step`] found is from float32 products and float64 losses, relative, by norm."""
    loss, of_states, of_weights = found
    weight = problem.head.weight.detach().float()
    want, total = torch.zeros((), dtype=torch.float64), problem.labels.numel()
    off, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    exact_weights = torch.zeros_like(weight)
    parts = (each.detach().flatten(0, 1).split(256) for each in (problem.states, of_states))
    for states, got, labels in zip(*parts, problem.labels.flatten().split(256), strict=True):
        exact = (states.float() @ weight.t()).double().requires_grad_()
        part = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum") / total
        of_logits = torch.autograd.grad(part, exact)[0].float()
        want += part.item()
        of_part = of_logits @ weight
        off += (got - of_part).double().square().sum().item()
        size += of_part.double().square().sum().item()
        exact_weights.addmm_(of_logits.t(), states.float())
    of_all = (of_weights - exact_weights).norm() / exact_weights.norm()
    return abs(loss.item() / want.item() - 1), (off / size).sqrt().item(), of_all.item()


def measure(shape: str, name: str, problem: Problem) -> dict[str, Any]:
    """A row of the CSV."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    words, hidden = problem.head.weight.shape
    row |= {"shape": shape, "tokens": problem.labels.numel(), "hidden": hidden, "words": words, "contender": name}
    started = time.perf_counter()
    try:
        found = step(CONTENDERS[name], problem)
        found[0].item()  # waits
        row |= {"first_call_s": round(time.perf_counter() - started, 2)}
        errors = errors_of(found, problem)
        del found
        row |= dict(
            zip(("loss_error", "states_error", "weights_error"), (f"{each:.1e}" for each in errors), strict=True)
        )
        if not (errors[0] <= LOSS_GATE and max(errors[1:]) <= GRADIENT_GATE):
            return row | {
                "status": "wrong: loss, states and weights are off by {:.1e}, {:.1e} and {:.1e}".format(*errors)
            }
        if problem.states.is_cuda:
            measured = harness.measure_device(lambda: step(CONTENDERS[name], problem))
            ms, peak = measured.ms, measured.peak_mib
        else:
            started = time.perf_counter()
            step(CONTENDERS[name], problem)
            ms, peak = 1e3 * (time.perf_counter() - started), 0.0
    except Exception as error:  # a contender that isn't installed, or finds no memory, has no time
        return row | {"status": harness.reason(error)}
    return row | {"status": "ok", "ms": round(ms, 3), "peak_mib": round(peak)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the arguments ask for; 1 where `kernel` has no time."""
    packages = ("trl", "liger-kernel")
    told = "{ms} ms, {peak_mib} MiB".format_map
    contest = Contest("heads", __doc__, SHAPES, TINY, CONTENDERS, "kernel", make_problem, measure, told, packages)
    return contest.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
