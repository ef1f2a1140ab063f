"""Loss curves of `otpo pretrain` by the type of its weights, from one seed on the same tokens.

`float32` weights under autocast, `bfloat16` weights with float32 masters, as the command trains them, and
`bfloat16-plain` ones by torch's AdamW, whose moments are bfloat16 and whose small steps are lost. The CSV has the
losses, the figure the curves and their differences from float32's.

    python -m benchmarks.weight_types
    python -m benchmarks.weight_types --shape compass-tiny --steps 30 --every 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from benchmarks import harness
from benchmarks.figures import legend, machine_line, save
from benchmarks.pretraining import SHAPES, command, make_data
from benchmarks.step_clock import Span
from moe_backbone.pretraining import trainer as pretraining
from moe_backbone.pretraining.weight_types import Choice
from otpo.cli.pretrain import main as pretrain

VARIANTS = {"float32": "float32", "bfloat16": "bfloat16", "bfloat16-plain": "bfloat16"}
"""The option `dtype` of each."""
LAST = 50  # steps of the mean at the end


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs each variant in a process of its own; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="compass-small", choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="steps of a point, whose mean loss it is")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/weight_types_SHAPE_GPU.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        return child(json.loads(args.child))
    if min(args.steps, args.every) < 1:
        parser.error("--steps and --every must be at least 1")
    name = f"weight_types_{args.shape}_{harness.name_of_machine()}.csv"
    output, console = args.output or Path("benchmarks/results") / name, Console(width=160, highlight=False)
    rows: list[dict[str, Any]] = []
    failed, machine = False, harness.describe_machine("transformers")
    with tempfile.TemporaryDirectory() as folder:
        span = Span(0, args.steps, 0)
        data = make_data(Path(folder), args.shape, span)
        for variant in args.variants:
            words = [*command(args.shape, "default", data, span), "--dtype", VARIANTS[variant]]
            words += ["--logging_steps", str(args.every), "--warmup_steps", str(args.steps // 20)]
            found = measure(words, variant, Path(folder))
            failed |= "failed" in found
            console.print(line(variant, found))
            for step, loss in found.get("losses", []):
                rows.append({"shape": args.shape, "variant": variant, "step": step, "loss": loss} | machine)
            if rows:
                harness.write_rows(output, rows)
    if rows:
        console.print(f"{draw(output)}\n{output}")
    return int(failed)


def measure(words: list[str], variant: str, folder: Path) -> dict[str, Any]:
    """Losses, speed and memory of a command line."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        told = json.dumps({"words": [*words, "--output_dir", output], "variant": variant, "result": str(result)})
        run = [sys.executable, "-m", "benchmarks.weight_types", "--child", told]
        ended = subprocess.run(run, check=False, capture_output=True, text=True)
    if ended.returncode or not result.exists():
        last = [each for each in ended.stderr.splitlines() if each.strip()][-1:] or ["no message"]
        return {"failed": last[0][:160]}
    return json.loads(result.read_text())


def child(told: dict[str, Any]) -> int:
    """The command itself; torch's AdamW in place of the one with masters where that is the variant."""
    if told["variant"] == "bfloat16-plain":
        pretraining.choose_optimizer = lambda trainer: Choice(None, "torch's AdamW, moments in bfloat16")
    log = Log()
    transformers_trainer.DEFAULT_CALLBACKS.append(log)  # pyright: ignore - an instance serves as well as a class
    code = pretrain(told["words"])
    if code or not log.losses:
        return code or 1
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    found = {"losses": log.losses, "tokens_per_s": statistics.median(log.rates), "peak_gib": peak, "seconds": log.s}
    Path(told["result"]).write_text(json.dumps(found))
    return 0


class Log(TrainerCallback):
    """Keeps the losses and the speed of a run."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.rates: list[float] = []
        self.s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.s = -time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))
            self.rates.append(logs["tokens_per_second"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.s += time.perf_counter()


def line(variant: str, found: dict[str, Any]) -> str:
    """A variant for the terminal."""
    if "failed" in found:
        return f"{variant:<16} failed: {found['failed']}"
    losses = found["losses"]
    late = [loss for step, loss in losses if step > losses[-1][0] - LAST]
    peak = "" if found["peak_gib"] is None else f", peak {found['peak_gib']:.1f} GiB"
    return (
        f"{variant:<16} final loss {losses[-1][1]:.4f}, mean of the last {min(LAST, losses[-1][0])} steps "
        f"{statistics.mean(late):.4f}, {found['tokens_per_s']:,.0f} tokens/s (median){peak}, {found['seconds']:.0f} s"
    )


def draw(path: Path) -> Path:
    """The curves, and below them how far each is from float32's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = harness.read_rows(path)
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curves.setdefault(row["variant"], {})[int(row["step"])] = float(row["loss"])
    figure, panels = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    base = curves.get("float32", {})
    for name, curve in curves.items():
        color = f"C{list(VARIANTS).index(name)}"
        panels[0].plot(list(curve), list(curve.values()), color=color, label=name, linewidth=1)
        shared = [step for step in curve if step in base]
        if name != "float32":
            panels[1].plot(shared, [curve[step] - base[step] for step in shared], color=color, linewidth=1)
    panels[0].set(ylabel="loss", title=f"otpo pretrain, {rows[0]['shape']}")
    panels[1].axhline(0, color="gray", linewidth=0.5)
    panels[1].set(xlabel="step", ylabel="loss - float32's")
    legend(figure, [panels[0]])
    figure.suptitle(machine_line(rows, "torch", "transformers"))
    return save(figure, path)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
