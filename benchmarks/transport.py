"""OT token weights: POT pair by pair, plain batched torch, and the Triton kernels.

A time is reported only if, in the same run, the weights of that very method and problem match float64 torch to
1e-4; otherwise the row says how far they are. POT and the plain loop get float64 costs, which are faster than the
float32 ones that keep a shared prefix at distance zero. `gb_per_s` counts the bytes that no method can save.

    python -m benchmarks.transport                      all sizes, writes CSV and figure
    python -m benchmarks.transport --pairs 8 --length 1024 --hidden 4096
    python -m benchmarks.transport --figure benchmarks/results/transport_h100.csv
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.figures import close_empty, legend, machine_line, save
from benchmarks.harness import describe_machine, measure, read_rows, write_rows
from otpo.transport.cost import pairwise_cost
from otpo.transport.solve import transport_weights

REGS = ((1.0, 0.2), (0.1, 1.0), (0.02, 0.2))
GATE = 1e-4
PAIRS = 8
"""Drawn, where there are rows of so many."""
PROBLEM = ("pairs", "length", "hidden", "reg", "reg_m", "method")
MEASURED = ("ms", "iterations", "residual", "error", "gb_per_s", "peak_mib", "note")
COLUMNS = PROBLEM + MEASURED


class Problem(NamedTuple):
    """Hidden states `(B, L, D)` bfloat16 and masks `(B, L)`, all tokens valid."""

    chosen: Tensor
    rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor


class Solution(NamedTuple):
    """Weights `(B, L)`, and of the worst pair the sweeps and the residual of `otpo.transport.sinkhorn.Transport`."""

    chosen: Tensor
    rejected: Tensor
    iterations: int = 0
    residual: float = float("nan")


def make_problem(pairs: int, length: int, hidden: int) -> Problem:
    """States of norm 40 that resemble a response and its rival: a shared eighth, then half a common part."""
    generator = torch.Generator("cuda").manual_seed(0)
    chosen, rejected = (torch.randn(pairs, length, hidden, device="cuda", generator=generator) for _ in range(2))
    rejected += 0.5 * chosen.roll(7, 1)
    rejected[:, : length // 8] = chosen[:, : length // 8]
    states = [(40 * x / x.norm(dim=2, keepdim=True)).bfloat16() for x in (chosen, rejected)]
    mask = torch.ones(pairs, length, dtype=torch.bool, device="cuda")
    return Problem(*states, mask, mask.clone())


def pot(problem: Problem, reg: float, reg_m: float, details: bool) -> Solution:
    """POT's `sinkhorn_unbalanced` on the GPU, one pair after the other, cropped to its valid tokens, float32."""
    for backend in ("JAX", "CUPY", "TENSORFLOW"):
        os.environ[f"POT_BACKEND_DISABLE_{backend}"] = "1"  # JAX would take three quarters of the GPU
    import ot

    chosen, rejected = (torch.zeros(x.shape, device=x.device) for x in (problem.chosen_mask, problem.rejected_mask))
    iterations, residual = 0, 0.0
    for i, (x, y, x_mask, y_mask) in enumerate(zip(*problem, strict=True)):
        x, y = x[x_mask][None], y[y_mask][None]
        cost = pairwise_cost(x, y, x_mask[x_mask][None], y_mask[y_mask][None])[0].float()
        m, n = cost.shape
        ones = cost.new_ones(m), cost.new_ones(n)
        plan = ot.unbalanced.sinkhorn_unbalanced(
            *ones, cost, reg, reg_m, method="sinkhorn", reg_type="kl", numItermax=5000, stopThr=1e-6, log=details
        )
        if details:
            plan, log = plan
            iterations = max(iterations, len(log["err"]))
            for dim, potential in ((1, log["logu"]), (0, log["logv"])):
                violation = plan.sum(dim).log() + reg / reg_m * potential
                residual = max(residual, violation.abs().max().item())
        tau = min(m, n) / plan.sum()
        chosen[i, x_mask] = plan.sum(1) * tau
        rejected[i, y_mask] = plan.sum(0) * tau
    return Solution(chosen, rejected, iterations, residual)


def plain_torch(problem: Problem, reg: float, reg_m: float, details: bool) -> Solution:
    """The textbook loop over all pairs at once: log domain, float32, a look at the residual every tenth sweep."""
    kernel = pairwise_cost(*problem).float() / -reg
    phi = reg_m / (reg_m + reg)
    b = torch.zeros_like(kernel[:, 0])
    for iteration in range(1, 5001):
        a = -phi * torch.logsumexp(kernel + b.unsqueeze(1), 2)
        lse = torch.logsumexp(kernel + a.unsqueeze(2), 1)
        if iteration % 10 == 0:
            residual = (lse + b / phi).abs().max().item()
            if residual <= 2e-6:
                break
        b = -phi * lse
    chosen, rejected = (a * (-reg / reg_m)).exp(), (b + lse).exp()
    tau = chosen.size(1)
    weights = (chosen * tau / chosen.sum(1, keepdim=True), rejected * tau / rejected.sum(1, keepdim=True))
    return Solution(*weights, iteration, residual)


def ours(problem: Problem, reg: float, reg_m: float, details: bool, solver: str = "triton") -> Solution:
    got = transport_weights(*problem, reg=reg, reg_m=reg_m, solver=solver)
    if not details:
        return Solution(got.chosen, got.rejected)
    return Solution(got.chosen, got.rejected, int(got.iterations.max()), float(got.residual.max()))


METHODS: dict[str, Callable[[Problem, float, float, bool], Solution]] = {
    "triton": ours,
    "torch float64": lambda *arguments: ours(*arguments, solver="torch"),
    "plain torch": plain_torch,
    "pot": pot,
}


def verify(got: Solution, want: Solution) -> float:
    """The largest relative error of a weight."""
    errors = [
        ((x.double() - y).abs() / y).amax() for x, y in ((got.chosen, want.chosen), (got.rejected, want.rejected))
    ]
    return torch.stack(errors).max().nan_to_num(torch.inf, torch.inf).item()


def gigabytes(problem: Problem, iterations: int) -> float:
    """Bytes that cannot be saved: states and distances once, then the distances in every sweep, in float32."""
    states = 2 * problem.chosen.numel() * problem.chosen.element_size()
    matrix = 4 * problem.chosen_mask.numel() * problem.rejected_mask.size(1)
    return (states + (1 + iterations) * matrix) / 1e9


def run_one(name: str, problem: Problem, regs: tuple[float, float], want: Solution) -> dict[str, Any]:
    pairs, length, hidden = problem.chosen.shape
    row: dict[str, Any] = dict(zip(PROBLEM, (pairs, length, hidden, *regs, name), strict=True))
    row |= dict.fromkeys(MEASURED, "")
    try:
        got = METHODS[name](problem, *regs, True)
    except torch.OutOfMemoryError:
        return row | {"note": "out of memory"}
    error = verify(got, want)
    row |= {"iterations": got.iterations, "residual": f"{got.residual:.1e}", "error": f"{error:.1e}"}
    if error > GATE:
        return row | {"note": f"not timed: weights off by more than {GATE:g}"}
    ms, peak = measure(lambda: METHODS[name](problem, *regs, False))
    row |= {"ms": f"{ms:.3f}", "gb_per_s": f"{gigabytes(problem, got.iterations) / ms * 1e3:.0f}"}
    row["peak_mib"] = f"{peak:.0f}"
    return row


def run(
    sizes: list[tuple[int, int, int]], methods: list[str], deadline: float, output: Path, console: Console
) -> list[dict]:
    """Measures every size and writes what there is after each, so that a killed run keeps its rows."""
    machine = describe_machine("pot", "transformers")
    rows = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for size in progress.track(sizes, description="transport"):
            if time.monotonic() > deadline:
                console.print(f"not reached in time: {size}")
                continue
            problem = make_problem(*size)
            for regs in REGS:
                reference = transport_weights(*problem, reg=regs[0], reg_m=regs[1], solver="torch", tolerance=1e-10)
                want = Solution(reference.chosen.double(), reference.rejected.double())
                for name in methods:
                    rows.append(run_one(name, problem, regs, want) | machine)
                    console.print(*(f"{rows[-1][key]}" for key in COLUMNS))
                torch.cuda.empty_cache()
            write_rows(output, rows)
    return rows


def print_table(rows: list[dict], console: Console) -> None:
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(str(row[key]) for key in COLUMNS))
    console.print(table)


def draw(path: Path) -> Path:
    """One panel for each setting: time over the tokens of a response, 8 pairs of D 4096 or else the first size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_rows(path) if row["ms"]]
    sizes = [(int(row["pairs"]), int(row["hidden"])) for row in rows]
    shown = (PAIRS, 4096) if (PAIRS, 4096) in sizes or not sizes else sizes[0]
    rows = [row for row, size in zip(rows, sizes, strict=True) if size == shown]
    figure, panels = plt.subplots(1, len(REGS), figsize=(11, 4.2), sharey=True, layout="constrained")
    lengths = sorted({int(row["length"]) for row in rows})
    for panel, (reg, reg_m) in zip(panels, REGS, strict=True):
        panel.set_title(f"reg {reg:g}, reg_m {reg_m:g}")
        here = [row for row in rows if (float(row["reg"]), float(row["reg_m"])) == (reg, reg_m)]
        if not here:
            continue
        for name in METHODS:
            points = sorted((int(row["length"]), float(row["ms"])) for row in here if row["method"] == name)
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="tokens of a response")
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"ms for the weights of {shown[0]} pairs, D {shown[1]}")
    legend(figure, panels)
    close_empty(panels)
    figure.suptitle(machine_line(rows, "torch", "triton"))
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 1, 4, 32], metavar="B")
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048, 256, 8192], metavar="L")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 2048], metavar="D")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further size after this time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/transport.csv"))
    parser.add_argument("--figure", type=Path, metavar="CSV", help="only draw the figure of this CSV")
    args = parser.parse_args()
    console = Console(width=200, highlight=False)
    if args.figure:
        console.print(f"{draw(args.figure)}")
        return
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; on the CPU, see tests/otpo_kernels")
    warnings.filterwarnings("ignore", module="ot")
    sizes = [(b, n, d) for d, n, b in product(args.hidden, args.length, args.pairs)]
    rows = run(sizes, args.methods, time.monotonic() + 60 * args.minutes, args.output, console)
    print_table(rows, console)
    if rows:
        console.print(f"{args.output} {draw(args.output)}")


if __name__ == "__main__":
    main()
