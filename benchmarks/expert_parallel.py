"""Training steps with experts spread over the GPUs of a node, beside DeepSpeed's own ways to train them.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True          the last case leaves no room for gaps
    torchrun --nproc_per_node 2 -m benchmarks.expert_parallel        all cases; CSV, figure and verdict
    torchrun --nproc_per_node 2 -m benchmarks.expert_parallel --cases compass-small --steps 20
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 -m benchmarks.expert_parallel --tiny --output /tmp/tiny
    python -m benchmarks.expert_parallel --plan benchmarks/results/expert_parallel_plan.csv
    python -m benchmarks.expert_parallel --figure benchmarks/results/expert_parallel_h100_x2.csv

A step is forward, backward and the optimizer's, in bfloat16 under ZeRO-2, experts over all GPUs, no checkpointing:

- `compass-small`: its sizes as a Qwen3-MoE of transformers, which AutoEP takes as it comes, and as Compass.
- `compass-v3 block`: one layer of compass-v3's width, vocabulary 8192.
- `only fits spread`: as many such layers as ours still trains, by SGD, which keeps no states; one try each.

Contenders have equal weights and batches. Before any time is taken, what the first step of each says of its tokens,
its loss and its gradients' norms (experts, all else) have to agree with data parallelism's; otherwise `status` says
what does not. `ms` is the slowest GPU's median, `peak_mib` the largest of a step. Shares are of the first GPU's kernel
time by kernel names; NCCL's kernels include waits for other GPUs. `idle_share` is what they leave of a timed step.
`predicted_*` is what `otpo plan` says of the same setup.
"""

import argparse
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks import expert_parallel_contenders as contenders
from benchmarks import harness
from benchmarks.expert_parallel_contenders import (
    AUTOEP,
    BASE,
    BASE_COMPILED,
    BLOCK,
    COMPASS,
    COMPILED,
    FITS,
    GATHERED,
    NATIVE,
    OURS,
    SMALL,
    Case,
)
from benchmarks.expert_parallel_steps import (
    GATES,
    KINDS,
    PeerFailed,
    Ranks,
    WrongResult,
    compare,
    first_step,
    measure_steps,
    profile_steps,
    step,
)
from benchmarks.figures import close_empty, grouped_bars, legend, machine_line, number, save
from moe_backbone.planning.hardware import find_gpu, recognise_gpu
from moe_backbone.planning.plan import make_plan
from moe_backbone.planning.setup import TrainingSetup

NOISE = 0.01
TARGETS = (
    *((SMALL, AUTOEP, 1.3), (SMALL, NATIVE, 1.5), (SMALL, BASE, 1.0), (SMALL, BASE_COMPILED, 1.0)),
    *((BLOCK, AUTOEP, None), (BLOCK, NATIVE, None), (BLOCK, BASE, 1.6), (BLOCK, BASE_COMPILED, 1.6)),
)
"""How much faster than whom ours is to be."""
MEASURED = ("ms", "tokens_per_s", "peak_mib", "setup_peak_mib", "setup_s", "before_mib")
SHARES = (*(f"{kind}_share" for kind in KINDS), "idle_share")
PREDICTED = {OURS: True, COMPASS: True, GATHERED: True, COMPILED: True, BASE: False, BASE_COMPILED: False}
COLUMNS = ("case", "contender", "gpus", "layers", "optimizer", "rows", "length", "status", *GATES, *MEASURED)
COLUMNS += ("predicted_mib", "predicted_ms", *SHARES)


def attempt(case: Case, name: str, ranks: Ranks, steps: int, row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fills a row, and `expected` where this is the contender that the others are compared with."""
    row["before_mib"] = round(ranks.mib("memory_allocated"))
    ranks.reset_peak()
    start = time.perf_counter()
    ids = contenders.make_batch(case, ranks.rank, ranks.device)
    with contenders.engine_of(case, name, ranks.world, ranks.rank, ranks.device) as engine:
        ranks.gather("set up")
        row["setup_s"] = round(time.perf_counter() - start, 1)
        row["setup_peak_mib"] = round(ranks.worst({"mib": ranks.mib("max_memory_allocated")})["mib"])
        found = first_step(engine, ids, ranks)
        row |= {column: float(f"{found[column]:.6g}") for column in tuple(GATES)[1:]}
        if name == BASE:
            expected.update(found)
        errors = compare(found, expected, ranks) if expected else {}
        row["nll_error"] = float(f"{errors.get('nll_error', float('nan')):.3g}") if errors else "not compared"
        over = {column: error for column, error in errors.items() if not error <= GATES[column]}
        if over:
            raise WrongResult(", ".join(f"{column} is off by {error:.2g}" for column, error in over.items()))
        for _ in range(2):
            step(engine, ids)
        ranks.synchronize()
        ranks.reset_peak()
        ms = measure_steps(engine, ids, steps, ranks)
        worst = ranks.worst({"ms": ms, "mib": ranks.mib("max_memory_allocated")})
        row |= {"ms": round(worst["ms"], 2), "peak_mib": round(worst["mib"])}
        row["tokens_per_s"] = round(1e3 * ranks.world * ids.numel() / worst["ms"])
        if name != NATIVE and case.name != FITS:
            row |= profile_steps(engine, ids, ranks, ms)
    ranks.gather("done")


def run_contender(case: Case, name: str, ranks: Ranks, steps: int, expected: dict[str, Any]) -> dict[str, Any]:
    """One line of the CSV."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"case": case.name, "contender": name, "gpus": ranks.world, "layers": case.sizes["num_hidden_layers"]}
    row |= {"optimizer": case.optimizer, "rows": case.rows, "length": case.length, "status": "ok"}
    row |= predict(case, name, ranks)
    try:
        attempt(case, name, ranks, steps, row, expected)
    except PeerFailed as error:
        row["status"] = str(error)
    except Exception as error:
        row["status"] = f"wrong: {error}" if isinstance(error, WrongResult) else harness.reason(error)
        ranks.fail(row["status"])
    contenders.clear(ranks.device)
    return row


def plan_case(case: Case, gpu: Any, gpus: int, ep_size: int, name: str = OURS) -> Any:
    setup = TrainingSetup(
        gpus_per_node=gpus,
        strategy="zero2",
        expert_parallel_size=ep_size,
        expert_exchange="gather" if name in (GATHERED, COMPILED) else "all_to_all",
        compile_layers=name in (COMPILED, BASE_COMPILED),
        micro_batch_size=case.rows,
        sequence_length=case.length,
        precision="bf16",
    )
    return make_plan(case.config("compass"), gpu, setup)


def write_plan(path: Path) -> list[dict[str, Any]]:
    """What is to be expected of compass-small at 1, 2, 4 and 8 H100, written down before any of it is run."""
    case = contenders.cases(1, 80 << 30)[0]
    rows: list[dict[str, Any]] = []
    for gpus in (1, 2, 4, 8):
        plan = plan_case(case, find_gpu("h100"), gpus, gpus)
        rate = gpus * case.rows * case.length / plan.time.total
        alone = rows[0]["tokens_per_s"] if rows else rate
        row = {"case": case.name, "gpus": gpus, "mib": round(plan.memory.allocated / harness.MIB)}
        row |= {"ms": round(1e3 * plan.time.total, 2), "all_to_all_ms": round(1e3 * plan.time.all_to_all, 2)}
        rows.append({**row, "tokens_per_s": round(rate), "efficiency": round(rate / gpus / alone, 3)})
    harness.write_rows(path, rows)
    return rows


def predict(case: Case, name: str, ranks: Ranks) -> dict[str, float]:
    """What `otpo plan` says; it knows no SGD."""
    gpu = recognise_gpu(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else find_gpu("h100")
    if name not in PREDICTED or case.optimizer != "adamw" or gpu is None:
        return {}
    plan = plan_case(case, gpu, ranks.world, ranks.world if PREDICTED[name] else 1, name)
    return {
        "predicted_mib": round(plan.memory.allocated / harness.MIB),
        "predicted_ms": round(1e3 * plan.time.total, 2),
    }


class Patience:
    """Ends this process where a contender gets stuck, say because the GPUs failed at different places."""

    def __init__(self, seconds: float, path: Path, rows: list[dict], row: dict[str, Any], first: bool):
        def give_up() -> None:
            if not first:
                time.sleep(5)  # the first process writes what there is
            else:
                status = f"no answer in {seconds:.0f} s; nothing further was run"
                harness.write_rows(path, [*rows, {**dict.fromkeys(COLUMNS, ""), **row, "status": status}])
                print(f"{row['case']}, {row['contender']}: {status}", flush=True)
            os._exit(3)

        self.timer = threading.Timer(seconds, give_up)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: Any) -> None:
        self.timer.cancel()


def run(args: argparse.Namespace, ranks: Ranks, path: Path, console: Console) -> list[dict]:
    """Every contender; the CSV is written after each, so that a killed run keeps its rows."""
    machine = harness.describe_machine("transformers", "deepspeed")
    deadline = harness.Deadline(args.minutes)
    memory = torch.cuda.get_device_properties(ranks.device).total_memory if ranks.device.type == "cuda" else 0
    rows: list[dict] = []
    for case in contenders.cases(ranks.world, memory, tiny=args.tiny):
        expected: dict[str, Any] = {}
        for name in case.contenders if case.name in args.cases else ():
            if name not in args.contenders or ranks.gather(deadline.passed)[0]:
                continue
            about = {"case": case.name, "contender": name, **machine}
            with Patience(args.patience, path, rows, about, ranks.rank == 0):
                row = run_contender(case, name, ranks, args.steps, expected) | machine
            rows.append(row)
            if ranks.rank == 0:
                console.print(*(f"{row[key]}" for key in COLUMNS))
                harness.write_rows(path, rows)
    return rows


def verdict(rows: list[dict], console: Console) -> None:
    """What was measured beside what was to be reached, and who has no time."""
    table = Table("target", "measured", "met", title="Verdict")
    found = {(row["case"], row["contender"]): row for row in rows}

    def speed(case: str, name: str) -> float:
        row = found.get((case, name), {})
        return float(row["tokens_per_s"]) if row.get("status") == "ok" else 0.0

    present = {row["case"] for row in rows}
    for case, rival, least in TARGETS:
        if case not in present:
            continue
        # Ours as pretraining runs it, where that ran.
        ours, others = speed(case, COMPILED) or speed(case, OURS), speed(case, rival)
        ratio = ours / others if ours and others else 0.0
        met = "" if least is None else "yes" if ratio >= least - NOISE else "NO"
        text = f"{case}: tokens/s over {rival}" + ("" if least is None else f" >= {least}")
        table.add_row(text, f"{ratio:.3f}" if ratio else "not measured", met)
    if FITS in present:
        ours, base = (found.get((FITS, name), {}).get("status", "not run") for name in (OURS, BASE))
        layers = next(row["layers"] for row in rows if row["case"] == FITS)
        met = "yes" if ours == "ok" and "out of memory" in base else "NO"
        text = f"{layers} layers of compass-v3: {OURS} trains, {BASE} does not fit"
        table.add_row(text, f"{OURS}: {ours}; {BASE}: {base}", met)
    console.print(table)
    harness.print_missing(rows, ("case", "contender", "status"), console)


def markdown(rows: list[dict]) -> str:
    """A table of tokens a second, memory and idle time."""
    cases = [case for case in (SMALL, BLOCK, FITS) if any(row["case"] == case for row in rows)]
    lines = [
        "| contender |" + "".join(f" `{case}` | GiB | idle |" for case in cases),
        "| --- |" + " --- |" * 3 * len(cases),
    ]
    for name in contenders.CONTENDERS:
        found = {row["case"]: row for row in rows if row["contender"] == name and row["status"] == "ok"}
        cells = [
            f" {int(row['tokens_per_s']):,} | {int(row['peak_mib']) / 1024:.1f} | {row['idle_share']} |"
            if row
            else "  |  |  |"
            for row in (found.get(case) for case in cases)
        ]
        if found:
            lines.append(f"| {name} |" + "".join(cells))
    return "\n".join(lines)


def draw(path: Path) -> Path:
    """Tokens a second, memory and the kinds of kernels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = harness.read_rows(path)
    names = [name for name in contenders.CONTENDERS if any(row["contender"] == name for row in rows)]
    figure, panels = plt.subplots(1, 3, figsize=(17, 5.2), layout="constrained")
    titles = (("tokens_per_s", 1e-3, "thousand tokens a second, all GPUs"), ("peak_mib", 1 / 1024, "GiB a GPU, peak"))
    for panel, (column, scale, title) in zip(panels, titles, strict=False):
        shown = [case for case in (SMALL, BLOCK, FITS) if any(row["case"] == case for row in rows)]
        found = {(row["contender"], row["case"]): row for row in rows}
        heights = {name: [scale * number(found.get((name, case), {}).get(column)) for case in shown] for name in names}
        for bars in grouped_bars(panel, shown, heights, [f"C{i}" for i in range(len(names))]):
            panel.bar_label(bars, fmt="%.3g", fontsize=7)
        panel.set_title(title)
    legend(figure, panels[:1], loc="outside lower left", fontsize=8)
    profiled = [row for row in rows if row["gemm_share"]]
    left = [0.0] * len(profiled)
    labels = [f"{row['case']}\n{row['contender']}" for row in profiled]
    for kind in KINDS:
        widths = [100 * float(row[f"{kind}_share"]) for row in profiled]
        panels[2].barh(labels, widths, left=left, label=kind.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panels[2].tick_params(axis="y", labelsize=7)
    panels[2].invert_yaxis()
    panels[2].set(title="kernel time of a step", xlabel="%")
    if profiled:
        legend(figure, panels[2:], loc="outside lower right", fontsize=8)
    close_empty(panels)
    gpus = f"{rows[0]['gpus']} x " if rows else ""
    figure.suptitle(gpus + machine_line(rows, "torch", "transformers", "deepspeed"))
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases, names = (SMALL, BLOCK, FITS), list(contenders.CONTENDERS)
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, metavar="NAME")
    parser.add_argument("--contenders", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no further contender after this time")
    parser.add_argument("--patience", type=float, default=75, help="seconds of a contender before the run is ended")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU too: a test of this program")
    parser.add_argument("--figure", type=Path, metavar="CSV", help="only print the verdict on this CSV and draw it")
    parser.add_argument("--plan", type=Path, metavar="CSV", help="only write what is to be expected at 1 to 8 GPUs")
    args = parser.parse_args()
    console = Console(width=200, highlight=False)
    if args.figure:
        verdict(harness.read_rows(args.figure), console)
        console.print(f"{draw(args.figure)}")
        return
    if args.plan:
        for row in write_plan(args.plan):
            console.print(" ".join(map(str, row.values())))
        return
    if "LOCAL_RANK" not in os.environ:
        parser.error("start this benchmark by torchrun")
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("this benchmark needs GPUs; on the CPU, --tiny tests it")
    import deepspeed

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    ranks = Ranks(device)
    path = args.output / f"expert_parallel_{harness.name_of_machine()}_x{ranks.world}.csv"
    rows = run(args, ranks, path, console)
    if ranks.rank == 0 and rows:
        verdict(rows, console)
        console.print(f"{path} {draw(path)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
