"""OTPO of a model of Qwen3-30B-A3B's shape, LoRA and every weight, its experts spread over the GPUs of a machine.

    python -m benchmarks.alignment_at_size                             what fits: LoRA, then every weight
    python -m benchmarks.alignment_at_size --adapters full --layers 8 4
    python -m benchmarks.alignment_at_size --arithmetic CSV            only the arithmetic on these rows
    python -m benchmarks.alignment_at_size --tiny --output /tmp/a.csv  small sizes, on two CPU processes too

Weights are random: hidden size 2048, 128 experts of 768, 8 a token, 32 heads of 128 and 4 for keys and values,
vocabulary 151,936, and as many of the 48 layers as fit (`benchmarks/sized_alignment/sizes.py`): `layers` says how
many. Training is `OTPOTrainer`'s, in bfloat16 under DeepSpeed's ZeRO-2, with expert parallelism over all GPUs, rows of
experts moved by memcpy, gradient checkpointing, and fused AdamW. LoRA has rank 16 on attention and experts, and the
model without it is the reference; every weight's training has a second model, spread too. Each GPU takes 8 pairs a
step, with 512 tokens of a prompt and 512 of a response: 32,768 tokens on 2 GPUs, prompts counted in both rows.

`s_per_step` is the mean of the timed steps from end to end, `peak_gib` the most that any GPU had allocated in one,
`made_gib` the most before. Shares are of the first GPU's kernel time in two more steps; NCCL's kernels include waits.
`idle_share` is what these kernels leave of a timed step.
`status` is `ok` where the first loss is log 2, as it has to be, and later ones are numbers. A model that does not fit
whole runs with fewer layers too: two numbers of them tell a layer's time from all else, which gives the whole model's.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.expert_parallel_steps import KINDS
from benchmarks.launching.processes import count_gpus, last_line, run_together, start
from benchmarks.sized_alignment.sizes import LAYERS, Case, bytes_of, fitting_layers, peak_of
from benchmarks.sized_alignment.worker import describe_machine, memory_of_gpu
from benchmarks.sized_alignment.worker import main as work
from benchmarks.sized_alignment.yardsticks import arithmetic, plan_lines
from benchmarks.step_clock import Span

ADAPTERS = ("lora", "full")
SHARES = (*(f"{kind}_share" for kind in KINDS), "idle_share")
COLUMNS = ("adapter", "layers", "gpus", "status", "pairs", "prompt", "response", "tokens_per_step", "s_per_step")
COLUMNS += ("tokens_per_s", "peak_gib", "planned_gib", "made_gib", *SHARES, "first_loss", "last_loss", "trained_here")
COLUMNS += ("setup_s", "first_step_s", "run_s", "step_ms", "rows")
_ERROR = re.compile(r"([\w.]*(?:OutOfMemoryError|Error:|Exception:).*)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 if a training has no time."""
    args = parse(arguments)
    if args.child:
        work(args.child)
        return 0
    console = Console(width=200, highlight=False, markup=False)
    if args.arithmetic:
        tell(harness.read_rows(args.arithmetic), console, args.tiny)
        return 0
    cases = chosen_cases(args)
    for case in cases:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in bytes_of(case).items())
        console.print(f"{case.adapter}, {case.layers} layers on {case.gpus}: GiB a GPU as counted: {parts}")
    rows: list[dict[str, Any]] = []
    machine = describe_machine()
    deadline = harness.Deadline(args.minutes)
    for case in cases:
        row = dict.fromkeys(COLUMNS, "") | {name: value for name, value in case._asdict().items() if name != "tiny"}
        row |= {"tokens_per_step": case.tokens, "planned_gib": round(peak_of(case) / 2**30, 2)}
        span = Span(args.warmup, args.steps, 2)
        row |= {"status": "not reached in time"} if deadline.passed else measure(case, span, args.patience)
        rows.append(row | machine)
        harness.write_rows(args.output, rows)
        console.print(line(row), soft_wrap=True)
    tell(rows, console, args.tiny)
    console.print(f"{args.output}")
    return 0 if rows and all(row["status"] == "ok" for row in rows) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS, metavar="NAME", help="lora, full")
    add("--layers", type=int, nargs="+", metavar="N", help="default: what fits, and half of that if it is not all 48")
    add("--gpus", type=int, metavar="N", help="processes; default: all GPUs, two processes on the CPU")
    add("--pairs", type=int, default=8, help="of a step on each GPU")
    add("--prompt", type=int, default=512, help="tokens")
    add("--response", type=int, default=512, help="tokens")
    add("--warmup", type=int, default=3, help="steps before the timed ones")
    add("--steps", type=int, default=5, help="timed steps")
    add("--minutes", type=float, default=8, help="start no further training after this time")
    add("--patience", type=float, default=300, metavar="SECONDS", help="a training that takes longer is ended")
    add("--tiny", action="store_true", help="small sizes, on the CPU too: a test of this program")
    add("--output", type=Path, help="default: benchmarks/results/alignment_at_size_MACHINE_xGPUS.csv")
    add("--arithmetic", type=Path, metavar="CSV", help="only print the arithmetic on this CSV")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.warmup, args.steps, args.pairs, args.prompt, *(args.layers or [1])) < 1 or args.response < 2:
        parser.error("--warmup, --steps, --pairs, --prompt and --layers must be at least 1, and --response 2")
    gpus = count_gpus()
    if not (gpus or args.tiny or args.arithmetic or args.child):
        parser.error("this benchmark needs GPUs; on the CPU, --tiny tests it")
    args.gpus = args.gpus or gpus or 2
    machine = f"{harness.name_of_machine()}_x{args.gpus}"
    args.output = args.output or Path("benchmarks/results") / f"alignment_at_size_{machine}.csv"
    return args


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """Each adapter's trainings, the largest first."""
    found = []
    for adapter in args.adapters:
        case = Case(adapter, 1, args.gpus, args.pairs, args.prompt, args.response, args.tiny)
        most = 2 if args.tiny else fitting_layers(case, memory_of_gpu())
        halved = [most] if most in (0, LAYERS) else [most, most // 2]
        found += [case._replace(layers=layers) for layers in args.layers or halved if layers]
    return found


def measure(case: Case, span: Span, patience: float) -> dict[str, Any]:
    """Runs a training in processes of its own; what they found."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        told = json.dumps({"case": case, "span": span, "result": str(result)})
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(case.gpus)]
        words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        words += ["-m", "benchmarks.alignment_at_size", "--child", told]
        variables = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        if not count_gpus():
            variables |= {"DS_ACCELERATOR": "cpu"}
        begin = time.perf_counter()

        def done(_job: Any, started: Any, seconds: float, hung: bool) -> None:
            if hung:
                found["status"] = f"no end after {patience:g} s"
            elif started.process.returncode or not result.is_file():
                found["status"] = f"failed: {reason_of(started.log)}"
            else:
                found.update(json.loads(result.read_text(encoding="utf-8")))

        run_together([case], 1, lambda _: start(words, Path(folder) / "log", **variables), done, patience)
        return {**found, "run_s": round(time.perf_counter() - begin, 1)}


def reason_of(log: Path) -> str:
    """The first error that a process named, from its name on: torch's launcher says more after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [found[1] for line in lines if "ChildFailedError" not in line and (found := _ERROR.search(line))]
    return (named[0] if named else last_line(log, "")).strip()[:300]


def line(row: dict[str, Any]) -> str:
    """A row in a line."""
    name = f"{row['adapter']}, {row['layers']} layers, {row['gpus']} GPUs"
    if not row["s_per_step"]:
        return f"{name}: {row['status']}"
    shares = ", ".join(f"{column.removesuffix('_share')} {100 * row[column]:.0f}%" for column in SHARES)
    return (
        f"{name}: {row['s_per_step']} s a step, {row['tokens_per_s']:,} tokens/s, peak {row['peak_gib'] or '-'} GiB "
        f"(counted {row['planned_gib']}), set up in {row['setup_s']} s; {shares}; {row['status']}"
    )


def tell(rows: Sequence[dict[str, Any]], console: Console, tiny: bool) -> None:
    """The arithmetic on rows that have times, and the plan of the whole model."""
    for adapter in ADAPTERS:
        measured = [row for row in rows if row["adapter"] == adapter and row["status"] == "ok"]
        if measured:
            console.print(f"{adapter}:")
            for text in arithmetic(measured):
                console.print(f"  {text}", soft_wrap=True)
    if rows and not tiny:
        sizes = (int(rows[0][name]) for name in ("layers", "gpus", "pairs", "prompt", "response"))
        for text in plan_lines(Case("full", *sizes, tiny=False)):
            console.print(text, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
