"""What `moe_backbone.planning.plan` says of a training step against the step itself, on one GPU.

Each setting runs real steps: forward with all losses, backward, fused AdamW; packed rows by documents' lengths, as
`otpo pretrain` runs them. Compared are the peak of PyTorch's allocator, and on the way to it what the weights and
moments take, what the forward keeps, and the gradients; and the time of a step. The benchmark ends with code 1 unless
each peak is within 10% of the plan and each step within 1.3 times. Plans of memory are bounds for compiled layers and
packed rows, which may take less.

    python -m benchmarks.planning
    torchrun --nproc_per_node 2 -m benchmarks.expert_parallel --cases compass-small      two GPUs: `predicted_*`
    python -m benchmarks.planning --model compass-tiny --sequence_length 512
"""

import argparse
import contextlib
import gc
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import describe_machine, name_of_gpu, write_rows
from moe_backbone import CompassConfig, CompassForCausalLM
from moe_backbone.packed_attention import NAME as TORCH_VARLEN
from moe_backbone.planning.activations import MASTERS, saved_activations
from moe_backbone.planning.hardware import find_gpu
from moe_backbone.planning.memory import plan_memory
from moe_backbone.planning.plan import load_config, make_plan
from moe_backbone.planning.setup import TrainingSetup
from moe_backbone.pretraining.master_adamw import MasterAdamW
from moe_backbone.pretraining.packing import PackedCollator
from moe_backbone.pretraining.weight_types import round_weights
from otpo.layouts.compiled import compile_layers

GATE, TIME_GATE = 0.1, 1.3
STEPS = 3
GIB = 2**30
SETTINGS: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 1},
    {"micro_batch_size": 4},
    {"micro_batch_size": 1, "gradient_checkpointing": True},
    {"micro_batch_size": 8, "gradient_checkpointing": True},
    {"micro_batch_size": 2, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    {"micro_batch_size": 2, "packed": True},
    {"micro_batch_size": 2, "optimizer": "adamw_foreach", "gradient_checkpointing": True},
    {"micro_batch_size": 2, "precision": "bf16-pure"},
    {"micro_batch_size": 4, "compile_layers": True, "experts_implementation": "memcpy"},
    {"micro_batch_size": 4, "packed": True, "compile_layers": True, "experts_implementation": "memcpy"},
    {"micro_batch_size": 4, "packed": True, "compile_layers": True, "experts_implementation": "memcpy"}
    | {"precision": MASTERS},
)
PLAIN: dict[str, Any] = {"compile_layers": False, "experts_implementation": "grouped_mm"}
"""What a setting has that does not say otherwise."""


def make_batch(config: CompassConfig, setup: TrainingSetup) -> dict[str, Any]:
    """Random tokens; where rows are packed two documents in each, joined with their lengths."""
    rows, length = setup.micro_batch_size, setup.sequence_length
    ids = torch.randint(config.vocab_size, (rows, length))
    if not setup.packed:
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length).expand_as(ids)}
    halves = [length // 2, length - length // 2]
    collator = PackedCollator(0, length, flatten=True)
    return collator([{"input_ids": row.tolist(), "seq_lengths": halves} for row in ids])


def run(config: CompassConfig, setup: TrainingSetup) -> dict[str, float]:
    """Trains for some steps; bytes and seconds."""
    torch.manual_seed(0)
    attention = TORCH_VARLEN if setup.packed else "sdpa"
    with torch.device("cuda"):
        model = CompassForCausalLM._from_config(
            config, attn_implementation=attention, experts_implementation=setup.experts_implementation
        ).train()
    if setup.compiles(config):
        compile_layers(model, dynamic=None)
    masters = setup.precision == MASTERS
    if masters:
        round_weights(model)
    elif setup.bytes_of.weights == 2:
        model = model.bfloat16()
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    foreach = setup.optimizer == "adamw_foreach"
    kind = MasterAdamW if masters else partial(torch.optim.AdamW, fused=not foreach, foreach=foreach)
    optimizer = kind(model.parameters(), lr=1e-4)
    made = make_batch(config, setup)
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in made.items()}
    measured: dict[str, float] = {}

    def forward() -> torch.Tensor:
        mixed = (
            torch.autocast("cuda", torch.bfloat16) if setup.bytes_of.copies or masters else contextlib.nullcontext()
        )
        with mixed:
            return model(**batch, use_cache=False).loss

    def step() -> None:
        for _ in range(setup.gradient_accumulation_steps):
            before = torch.cuda.memory_allocated()
            loss = forward()
            measured["kept"] = torch.cuda.memory_allocated() - before
            loss.backward()
        measured["with_gradients"] = torch.cuda.memory_allocated()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss}")

    step()
    torch.cuda.synchronize()
    measured["static"] = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    measured["gradients"] = measured.pop("with_gradients") - measured["static"]
    return {**measured, "peak": torch.cuda.max_memory_allocated(), "ms": statistics.median(times)}


def compare(config: CompassConfig, setup: TrainingSetup, gpu: str) -> dict[str, Any]:
    """One line of the CSV: the plan, the run, and by how much the plan is off."""
    plan = make_plan(config, find_gpu(gpu), setup)
    # Of accumulated gradients all are there at the peak, whenever that is.
    whole = plan_memory(config, replace(setup, gradient_accumulation_steps=2))
    kept = saved_activations(
        config, setup.batch, setup.bytes_of, gradient_checkpointing=setup.gradient_checkpointing
    ).total
    memory = plan.memory
    predicted = {
        "static": memory.weights + memory.optimizer,
        "kept": kept,
        "gradients": whole.gradients,
        "peak": memory.allocated,
    }
    measured = run(config, setup)
    row: dict[str, Any] = {
        name: getattr(setup, name)
        for name in (
            "precision",
            "optimizer",
            "micro_batch_size",
            "sequence_length",
            "gradient_checkpointing",
            "gradient_accumulation_steps",
            "packed",
            "experts_implementation",
        )
    }
    row["compiled"] = setup.compiles(config)
    for name, value in predicted.items():
        row[f"{name}_gib_predicted"] = round(value / GIB, 3)
        row[f"{name}_gib_measured"] = round(measured[name] / GIB, 3)
        row[f"{name}_error"] = round(value / measured[name] - 1, 4)
    row["ms_predicted"] = round(1e3 * plan.time.total, 1)
    row["ms_measured"] = round(measured["ms"], 1)
    row["ms_error"] = round(1e3 * plan.time.total / measured["ms"] - 1, 4)
    achieved = plan.flops * setup.tokens_per_step / (measured["ms"] / 1e3)
    row["mfu_predicted"], row["mfu_measured"] = round(plan.mfu, 4), round(achieved / (plan.gpu.tflops * 1e12), 4)
    row["peak_at"] = memory.moment
    parts = {**memory.parts}
    parts.pop("framework")  # the allocator does not see it
    return {**row, **{f"plan_{name}_gib": round(value / GIB, 3) for name, value in parts.items()}}


def print_tables(rows: list[dict[str, Any]], console: Console) -> None:
    """Predicted, measured and their difference for each setting, then the parts of the plans."""
    table = Table("setting", title="GiB and ms: plan / run, error")
    names = ("static", "kept", "gradients", "peak", "ms")
    for name in names:
        table.add_column(name, justify="right")
    parts = [name for name in rows[0] if name.startswith("plan_")]
    plans = Table("setting", "peak at", title="Plans at their peak, GiB")
    for name in parts:
        plans.add_column(name.removeprefix("plan_").removesuffix("_gib"), justify="right")
    for row in rows:
        words = [row["precision"], row["optimizer"], f"{row['micro_batch_size']} x {row['sequence_length']}"]
        words += ["checkpointing"] * row["gradient_checkpointing"] + ["packed"] * row["packed"]
        words += ["compiled"] * row["compiled"]
        if row["gradient_accumulation_steps"] > 1:
            words.append(f"{row['gradient_accumulation_steps']} micro-batches")
        cells = []
        for name in names:
            unit = "" if name == "ms" else "_gib"
            pair = f"{row[f'{name}{unit}_predicted']} / {row[f'{name}{unit}_measured']}"
            cells.append(f"{pair}, {row[f'{name}_error']:+.1%}")
        table.add_row(", ".join(words), *cells)
        plans.add_row(", ".join(words), row["peak_at"], *(f"{row[name]:.2f}" for name in parts))
    console.print(table)
    console.print(plans)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="compass-small", help="preset, or path of a configuration")
    parser.add_argument("--sequence_length", type=int, default=4096, metavar="N")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/planning_GPU.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; on the CPU, see tests/moe_backbone/test_planning.py")
    config, gpu = load_config(args.model), name_of_gpu()
    rows = []
    for setting in SETTINGS:
        setup = TrainingSetup(gpus_per_node=1, sequence_length=args.sequence_length, **(PLAIN | setting))
        row = {"model": args.model, **compare(config, setup, gpu), **describe_machine("transformers")}
        rows.append(row)
        print(f"{setting}: peak {row['peak_error']:+.1%}, {row['ms_predicted']} / {row['ms_measured']} ms", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    console = Console(width=200, highlight=False)
    print_tables(rows, console)
    path = args.output or Path(f"benchmarks/results/planning_{gpu}.csv")
    write_rows(path, rows)
    large = [row for row in rows if not peak_is_near(row)]
    slow = [row for row in rows if not 1 / TIME_GATE < 1 + row["ms_error"] < TIME_GATE]
    console.print(
        f"{path}: of {len(rows)} settings {len(rows) - len(large)} with a peak within {GATE:.0%}, "
        f"{len(rows) - len(slow)} with a step within {TIME_GATE} times"
    )
    return 1 if large or slow else 0


def peak_is_near(row: dict[str, Any]) -> bool:
    """Whether a peak is within the gate of its plan, or below it where the plan is a bound."""
    bound = row["compiled"] or row["packed"]
    return row["peak_error"] >= -GATE if bound else abs(row["peak_error"]) <= GATE


if __name__ == "__main__":
    sys.exit(main())
