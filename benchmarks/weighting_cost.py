"""What each weighting costs beside the preference step that it is part of: time on the device, and its share.

    python -m benchmarks.weighting_cost                      8 pairs of 1024 tokens, and the step of Qwen3-1.7B's shape
    python -m benchmarks.weighting_cost --step_ms 538        the step's time is known
    python -m benchmarks.weighting_cost --tiny --output /tmp/tiny.csv       on the CPU: a test of this program

A weighting is called as the trainer calls it, on a batch whose responses fill all 1024 positions: more tokens than
those of the step beside it, whose rows hold a prompt too. A time is taken only if, in the same run, the weights agree
with those of float64 to 1e-4 of the largest. `ms` is the device's, calls queued one behind the other; `call_ms` holds
the host's part too, which a training hides. The step is `otpo`'s with packed rows, compiled layers, checkpointing.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.preference_step.cases import CONTENDERS, DENSE, Case
from benchmarks.preference_step.training import timed_steps
from benchmarks.step_clock import Span
from otpo import OTPOConfig
from otpo.weighting import PairBatch, TokenWeights
from otpo.weighting.registry import WEIGHTINGS, make_weighting

GATE = 1e-4
MOST_SHARE = 0.005
"""Of the step: what a weighting may cost."""
NAMED: dict[str, dict[str, Any]] = {name: {"weighting": name} for name in WEIGHTINGS}
NAMED["ld"] |= {"ld_alpha": 0.5}
NAMED |= {
    "otpo-reg0.1": {"weighting": "otpo", "ot_reg": 0.1},
    "contrast-reg0.1": {"weighting": "contrast", "ot_cost": "euclidean", "ot_reg": 0.1},
    "contrast-cosine-reg0.1": {"weighting": "contrast", "ot_reg": 0.1, "ot_cost": "cosine"},
    "contrast-half": {"weighting": "contrast", "contrast_mix": 0.5},
    "otpo*diff": {"weighting": "otpo*diff"},
}
"""Options of `OTPOConfig` by the name of a row."""
STEP = "otpo-packed-compiled"
COLUMNS = ("weighting", "pairs", "length", "hidden", "error", "ms", "call_ms", "step", "step_ms", "share", "status")


def make_batch(pairs: int, length: int, hidden: int, device: torch.device) -> PairBatch:
    """States of norm 40 that resemble a response and its rival: a shared eighth, then half a common part.

    States are bfloat16 on a GPU, float32 elsewhere; log-probabilities are float32.
    """
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(pairs, length, hidden, generator=draw) for _ in range(2))
    rejected += 0.5 * chosen.roll(7, 1)
    rejected[:, : length // 8] = chosen[:, : length // 8]
    states = torch.cat([40 * x / x.norm(dim=2, keepdim=True) for x in (chosen, rejected)])
    shape = (2 * pairs, length)
    logps, reference = (-torch.rand(shape, generator=draw) * 4 for _ in range(2))
    values = {
        "unmatched": (torch.rand(shape, generator=draw) < 0.3).float(),
        "given_weights": torch.rand(shape, generator=draw),
    }
    return PairBatch(
        torch.ones(shape, dtype=torch.bool, device=device),
        torch.randint(4096, shape, generator=draw).to(device),
        logps.to(device),
        states.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32),
        reference_logps=reference.to(device),
        token_values={name: value.to(device) for name, value in values.items()},
    )


def weigh(options: dict[str, Any], exact: bool) -> Callable[[PairBatch], torch.Tensor]:
    """A weighting as the trainer has it; `exact` solves in float64, to 1e-10."""
    solving: dict[str, Any] = {"ot_solver": "torch", "ot_tolerance": 1e-10, "ot_max_iterations": 20_000}
    args = OTPOConfig(use_cpu=not torch.cuda.is_available(), bf16=False, **options, **(solving if exact else {}))
    weighting = make_weighting(args)

    def values(batch: PairBatch) -> torch.Tensor:
        found = weighting(batch)
        return found.values if isinstance(found, TokenWeights) else found

    return values


def in_float64(batch: PairBatch) -> PairBatch:
    """The same numbers, in float64."""
    reference = batch.reference_logps
    return dataclasses.replace(
        batch,
        logps=batch.logps.double(),
        hidden_states=batch.hidden_states.double(),
        reference_logps=None if reference is None else reference.double(),
        token_values={name: value.double() for name, value in batch.token_values.items()},
    )


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest weight; infinite where one is not finite."""
    difference = (got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1e-12)
    return difference.nan_to_num(torch.inf).item()


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds on the device, and of a call; on the CPU both are the call's."""
    run()
    if device.type == "cuda":
        return harness.measure_device(run).ms, harness.measure(run)[0]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return (statistics.median(times),) * 2


def step_time(pairs: int, tiny: bool, device: torch.device) -> float:
    """The median step of the shape and contender that the rows name, ms."""
    case = Case(DENSE, "full", "full", True, "single", 1, pairs, tiny)
    contender = CONTENDERS["otpo-padded" if device.type == "cpu" else STEP]
    span = Span(1, 2, 1) if tiny else Span(4, 10, 1)
    return float(timed_steps(case, contender, device, span)[0]["ms"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; 1 if a weighting is wrong or costs more than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--weightings", nargs="+", default=list(NAMED), choices=list(NAMED), metavar="NAME")
    parser.add_argument("--step_ms", type=float, help="of the step, where it is known; it is measured otherwise")
    parser.add_argument("--tiny", action="store_true", help="a small step, on the CPU too")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/weighting_cost.csv"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("this benchmark needs a GPU; on the CPU, --tiny tests it")
    if min(args.pairs, args.length, args.hidden) < 1:
        parser.error("--pairs, --length and --hidden must be at least 1")
    console = Console(width=160, highlight=False)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    step_ms = args.step_ms or step_time(args.pairs, args.tiny, device)
    machine = harness.describe_machine("transformers", "trl")
    batch = make_batch(args.pairs, args.length, args.hidden, device)
    exact = in_float64(batch)
    rows: list[dict[str, Any]] = []
    sizes = {"pairs": args.pairs, "length": args.length, "hidden": args.hidden}
    for name in args.weightings:
        run = weigh(NAMED[name], exact=False)
        error = error_of(run(batch), weigh(NAMED[name], exact=True)(exact))
        row = dict.fromkeys(COLUMNS, "") | {"weighting": name, **sizes, "error": f"{error:.1e}"}
        row |= {"step": "given" if args.step_ms else "measured", "step_ms": round(step_ms, 2)}
        if error > GATE:
            row["status"] = f"not timed: weights off by more than {GATE:g}"
        else:
            ms, call_ms = timed(lambda run=run: run(batch), device)
            share = ms / step_ms
            row |= {"ms": round(ms, 4), "call_ms": round(call_ms, 4), "share": round(share, 6)}
            row["status"] = "ok" if share <= MOST_SHARE else f"over {MOST_SHARE:.1%}"
        rows.append(row | machine)
        console.print(*(f"{row[key]}" for key in COLUMNS))
        harness.write_rows(args.output, rows)
    console.print(f"{args.output}")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
