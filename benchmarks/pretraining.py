"""`otpo pretrain` as its user types it, one process a variant: tokens a second, MFU, idle time, memory, and the loss.

Each variant is one command line on the same tokens from the same seed. The first variant, grouped products with no
layer compiled, is what the others' losses are compared with: a time is printed only where the first step's loss agrees
to 0.1%, its gradients' norm to 5%, and how far the mean of the others is below it to 5%, or 30% at v3's width, where a
run repeats itself no better than to 22%; it is the loss of the next token, without what is added.
`default` is what a user gets who says nothing, `transformers` the same model by transformers' class and Trainer, where
it has one.

    python -m benchmarks.pretraining
    python -m benchmarks.pretraining --shapes compass-small --variants grouped_mm default
    python -m benchmarks.pretraining --figure benchmarks/results/pretraining_h100.csv
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import trainer as transformers_trainer

from benchmarks import harness
from benchmarks.figures import close_empty, grouped_bars, legend, machine_line, number, save
from benchmarks.kernel_trace import largest_groups
from benchmarks.pretraining_rival import train as train_rival
from benchmarks.step_clock import Clock, Span
from benchmarks.words import word_tokenizer
from otpo.cli.pretrain import main as pretrain

TOLERANCE, NORM_TOLERANCE, LEARNT_TOLERANCE = 1e-3, 5e-2, 5e-2
"""Of the first loss, of its gradients' norm, and of how far below it the mean of the others is: half a learning rate
is off by half."""
WIDE, WIDE_4 = "compass-v3-width", "compass-v3-width-4-layers"
LEARNT_TOLERANCES = {WIDE: 0.3, WIDE_4: 0.3}
"""Where one command does not repeat itself: `grouped_mm` of v3's width learnt 0.2185 and 0.2379 in 79 steps from one
seed on two H200, with the same first loss, and first norms that agree to 5e-7. Sums in another order are enough."""
COLUMNS = ("shape", "variant", "status", "steps", "first_loss", "first_norm", "loss")
ERRORS = ("loss_error", "norm_error", "learnt_error")
COLUMNS += ERRORS
COLUMNS += ("ms", "tokens_per_s", "mfu", "idle_share", "peak_mib", "first_step_s", "run_s", "step_ms", "speedup")
COLUMNS += ("command",)
_QWEN = "hidden_size=2048,num_hidden_layers=4,num_attention_heads=32,num_key_value_heads=4,head_dim=128"
_QWEN += ",moe_intermediate_size=768,num_experts=128,num_experts_per_tok=8,num_mtp_layers=0"
# transformers weighs the experts' load in another way, and has no z-loss: with them its updates are others.
_QWEN += ",router_aux_loss_coef=0.0,router_z_loss_coef=0.0"


def _wide(layers: int) -> list[str]:
    """So many layers of compass-v3's width. At the default rate, 3e-4, variants were seen to part in what they learn,
    with right first losses; that rounding alone does it is our guess."""
    changes = f"num_hidden_layers={layers},num_experts=4,num_experts_per_tok=2,num_mtp_layers=0"
    rate = ["--per_device_train_batch_size", "2", "--learning_rate", "1e-4"]
    return ["--preset", "compass-v3", "--config_overrides", changes, *rate]


SHAPES: dict[str, list[str]] = {
    "compass-small": ["--preset", "compass-small"],
    # One expert of compass-v3 has 302M parameters, of 14 to 16 bytes each: four of them fit 80 GB in two layers, and
    # 141 GB in four.
    WIDE: _wide(2),
    WIDE_4: _wide(4),
    "qwen3-30b-a3b-4-layers": ["--preset", "compass-small", "--config_overrides", _QWEN],
    "compass-tiny": ["--preset", "compass-tiny", "--sequence_length", "128", "--per_device_train_batch_size", "2"],
}
"""What each shape adds to the command."""
LARGE = tuple(name for name in SHAPES if name not in ("compass-tiny", WIDE_4))
"""What is measured by default: it fits a GPU of 80 GB."""
GROUPED, RIVAL = "grouped_mm", "transformers"
VARIANTS: dict[str, list[str]] = {
    GROUPED: ["--experts_implementation", "grouped_mm", "--compile_layers", "false"],
    "plain": [
        *("--experts_implementation", "grouped_mm", "--compile_layers", "false"),
        *("--attn_implementation", "sdpa", "--token_loss", "logits"),
    ],
    "memcpy": ["--experts_implementation", "memcpy", "--compile_layers", "false"],
    "default": [],
    "default-sdpa": ["--attn_implementation", "sdpa"],
    "default-logits": ["--token_loss", "logits"],
    "default-chunked": ["--token_loss", "chunked"],
    "default-float32": ["--dtype", "float32"],
    "grouped_mm-float32": [
        *("--experts_implementation", "grouped_mm", "--compile_layers", "false"),
        *("--dtype", "float32"),
    ],
    "exact": [
        *("--experts_implementation", "eager", "--compile_layers", "false", "--attn_implementation", "sdpa"),
        *("--token_loss", "logits", "--dtype", "float32", "--bf16", "false", "--tf32", "false"),
    ],
    RIVAL: [],
}
"""What each variant adds; those named after `default` change one thing of it. On a GPU weights are bfloat16.

`exact` has float32 throughout, to see which of two others is nearer to it."""
WARMUP, SLOWLY = 4, {WIDE: 64, WIDE_4: 64}
"""Steps before the timed ones. At v3's width 20 steps learn a thousandth of the loss, which says nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 if a variant has no time."""
    args = parse(arguments)
    console = Console(width=160, highlight=False)
    if args.child:
        return child(json.loads(args.child))
    if args.figure:
        console.print(f"{draw(args.figure)}")
        return 0
    rows = run(args, console)
    console.print(f"{draw(args.output)}\n{args.output}")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(LARGE), choices=list(SHAPES), metavar="NAME")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[GROUPED, "plain", "memcpy", "default"],
        choices=list(VARIANTS),
        metavar="NAME",
    )
    parser.add_argument("--warmup", type=int, help="steps before the timed ones (default: 4, at v3's width 64)")
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--profiled", type=int, default=2, help="steps after them, under the profiler")
    parser.add_argument(
        "--profile", choices=list(VARIANTS), metavar="NAME", help="write that variant's largest kernels beside the CSV"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/pretraining_GPU.csv")
    parser.add_argument("--figure", type=Path, metavar="CSV", help="only draw this CSV")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.steps, WARMUP if args.warmup is None else args.warmup, args.profiled) < 1:
        parser.error("--steps, --warmup and --profiled must be at least 1")
    args.output = args.output or Path("benchmarks/results") / f"pretraining_{harness.name_of_machine()}.csv"
    return args


def run(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every variant of every shape, [`GROUPED`] first; the CSV is written after each one, for runs that are killed."""
    names = [GROUPED, *(name for name in args.variants if name != GROUPED)]
    rows: list[dict[str, Any]] = []
    machine = harness.describe_machine("transformers")
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            warmup = SLOWLY.get(shape, WARMUP) if args.warmup is None else args.warmup
            span = Span(warmup, args.steps, args.profiled)
            data = make_data(Path(folder), shape, span)
            expected: dict[str, Any] | None = None
            for name in names:
                row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"shape": shape, "variant": name}
                row["steps"] = span.steps
                words = command(shape, name, data, span)
                row |= measure(words, span, Path(folder), rival=name == RIVAL)
                kernels = row.pop("kernels", None)
                if kernels and name == args.profile:
                    args.output.with_name(f"{args.output.stem}_{shape}_{name}.txt").write_text(kernels)
                row = judged(row, expected)
                expected = row if name == GROUPED else expected
                if name in args.variants:
                    rows.append(row | machine)
                    harness.write_rows(args.output, rows)
                    console.print(line(row))
    return rows


def make_data(folder: Path, shape: str, span: Span) -> dict[str, Path]:
    """Seeded tokens as a Parquet file, more than the steps need, and a tokenizer of that many words."""
    tiny = shape == "compass-tiny"
    words, length, rows = (500, 128, 4) if tiny else (32_000, 4096, 8)
    draw = np.random.default_rng(0)
    # A language to learn: a token's successor is one of a few, so that losses of right and wrong steps differ soon.
    successors = draw.integers(3, words, (words, 4))
    documents = np.empty((span.total * rows, length), dtype=np.int64)
    documents[:, 0] = draw.integers(3, words, len(documents))
    for place in range(1, length):
        documents[:, place] = successors[documents[:, place - 1], draw.integers(0, 4, len(documents))]
    data = {"tokens": folder / f"{shape}.parquet", "tokenizer": folder / f"tokenizer_{words}"}
    Dataset.from_dict({"input_ids": list(documents)}).to_parquet(data["tokens"])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = word_tokenizer(words - len(special), list(special.values()), **special)
    tokenizer.save_pretrained(data["tokenizer"])
    return data


def command(shape: str, variant: str, data: dict[str, Path], span: Span) -> list[str]:
    """The words behind `otpo pretrain`; a shape's and a variant's come last and win."""
    common = ["--tokenizer_name_or_path", str(data["tokenizer"]), "--dataset_name", str(data["tokens"])]
    common += ["--sequence_length", "4096", "--per_device_train_batch_size", "4", "--max_steps", str(span.total)]
    # A log of the first step and one of all others that count: each log waits for the device.
    common += ["--logging_first_step", "true", "--logging_steps", str(span.warmup + span.steps)]
    common += ["--save_strategy", "no", "--report_to", "none", "--seed", "0"]
    if not torch.cuda.is_available():
        common += ["--use_cpu", "true", "--bf16", "false"]
    return [*common, *SHAPES[shape], *VARIANTS[variant]]


def measure(words: list[str], span: Span, folder: Path, *, rival: bool) -> dict[str, Any]:
    """Runs a command in a process of its own, with a clock among its trainer's callbacks.

    Args:
        words: Behind `otpo pretrain`.
        span: Of its steps.
        folder: For its files.
        rival: Whether transformers' class and Trainer run it; see `pretraining_rival`.
    """
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        told = json.dumps(
            {"words": [*words, "--output_dir", output], "span": span, "result": str(result)} | {"rival": rival}
        )
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.pretraining", "--child", told],
            check=False,
            capture_output=True,
            text=True,
        )
    shown = {"command": " ".join(["otpo pretrain", *words]).replace(str(folder), "DATA")}
    if rival:
        shown["command"] = f"transformers' class and Trainer, with the options of {shown['command']}"
    if ended.returncode or not result.exists():
        last = [each for each in ended.stderr.splitlines() if each.strip()][-1:] or ["no message"]
        return shown | {"status": f"failed: {last[0][:160]}"}
    return shown | json.loads(result.read_text())


def child(told: dict[str, Any]) -> int:
    """The command itself, timed; transformers gives every trainer the callbacks of a list."""
    span = Span(*told["span"])
    on_gpu = torch.cuda.is_available()
    clock = PretrainingClock(span, torch.device("cuda" if on_gpu else "cpu"))
    transformers_trainer.DEFAULT_CALLBACKS.append(clock)  # an instance serves as well as a class
    code = (train_rival if told["rival"] else pretrain)(told["words"])
    if code or len(clock.logs) < 2:
        return code or 1
    # The ratio of a log's MFU and its rate is the model's operations a token.
    first, log, *_ = clock.logs
    tokens = log["tokens_per_second"] * (log["seconds"] - first["seconds"]) / (span.warmup + span.steps - 1)
    rate = tokens * span.steps / clock.window_s
    row: dict[str, Any] = {"status": "ok", "first_loss": first["lm_loss"], "loss": log["lm_loss"]}
    row["first_norm"] = first["grad_norm"]
    row |= {"ms": round(statistics.median(clock.step_ms()), 2), "tokens_per_s": round(rate)}
    row |= {"idle_share": round(clock.idle_of_timed, 4), "first_step_s": round(clock.first_step_s, 2)}
    row["step_ms"] = " ".join(f"{ms:.1f}" for ms in clock.step_ms())
    row["run_s"] = round(clock.run_s, 1)
    row["kernels"] = largest_groups(clock.profile, 60, on_gpu=on_gpu)
    if on_gpu:
        row["peak_mib"] = round(clock.peak / harness.MIB)
        row["mfu"] = round(rate * log["mfu"] / log["tokens_per_second"], 4) if "mfu" in log else ""
    Path(told["result"]).write_text(json.dumps(row))
    return 0


class PretrainingClock(Clock):
    """Keeps what the trainer logs, too."""

    def __init__(self, span: Span, device: torch.device) -> None:
        super().__init__(span, device)
        self.logs: list[dict[str, float]] = []
        self.run_s = 0.0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._began = self.begun

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append({**logs, "seconds": self._now() - self._began})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run_s = self._now() - self._began


def judged(row: dict[str, Any], expected: dict[str, Any] | None) -> dict[str, Any]:
    """The row with its losses compared, and without times where they differ.

    A mean loss alone would say little: of a few steps it is near the first one, whatever the updates were.
    """
    if row["status"] != "ok" or expected is None:
        return row if row["status"] != "ok" else row | dict.fromkeys(ERRORS, 0.0) | {"speedup": 1.0}
    if expected["status"] != "ok":
        return _without_times(row, f"nothing to compare with, {GROUPED}: {expected['status']}")
    error = abs(row["first_loss"] / expected["first_loss"] - 1)
    row["loss_error"] = float(f"{error:.3e}")
    if not error <= TOLERANCE:
        return _without_times(row, f"wrong: the first loss is off by {error:.1e}")
    error = abs(row["first_norm"] / expected["first_norm"] - 1)
    row["norm_error"] = float(f"{error:.3e}")
    if not error <= NORM_TOLERANCE:
        return _without_times(row, f"wrong: the norm of the first gradients is off by {error:.1e}")
    learnt, wanted = (each["first_loss"] - each["loss"] for each in (row, expected))
    error = abs(learnt - wanted) / max(abs(wanted), 1e-9)
    row["learnt_error"] = float(f"{error:.3e}")
    if not error <= LEARNT_TOLERANCES.get(row["shape"], LEARNT_TOLERANCE):
        return _without_times(row, f"wrong: {learnt:.4f} of the loss is learnt, {GROUPED}: {wanted:.4f}")
    return row | {"speedup": round(row["tokens_per_s"] / expected["tokens_per_s"], 3)}


def _without_times(row: dict[str, Any], status: str) -> dict[str, Any]:
    kept = ("shape", "variant", "steps", "first_loss", "first_norm", "loss", *ERRORS, "command")
    return {name: row[name] if name in kept else "" for name in row} | {"status": status}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    name = f"{row['shape']:<24}{row['variant']:<16}"
    if row["status"] != "ok":
        return f"{name} {row['status']}"
    words = [f"{row['ms']} ms", f"{row['tokens_per_s']} tokens/s", f"{row['speedup']} x", f"idle {row['idle_share']}"]
    if row["mfu"] != "":
        words += [f"MFU {row['mfu']}", f"{row['peak_mib'] / 1024:.1f} GiB"]
    return f"{name} " + ", ".join([*words, f"loss {row['loss']:.4f}", f"first step {row['first_step_s']} s"])


def draw(path: Path) -> Path:
    """Tokens a second of each variant, a group for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row | {"shape": row["shape"].replace("-4-layers", ", 4 layers")} for row in harness.read_rows(path)]
    shapes, names = (list(dict.fromkeys(row[column] for row in rows)) for column in ("shape", "variant"))
    found = {(row["variant"], row["shape"]): number(row["tokens_per_s"]) / 1e3 for row in rows}
    heights = {name: [found.get((name, shape), float("nan")) for shape in shapes] for name in names}
    figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
    for bars in grouped_bars(panel, shapes, heights, [f"C{i}" for i in range(len(names))]):
        panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    panel.margins(y=0.15)
    panel.set(ylabel="thousand tokens a second", title="otpo pretrain")
    legend(figure, [panel])
    close_empty([panel])
    figure.suptitle(machine_line(rows, "torch", "transformers"))
    return save(figure, path)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
