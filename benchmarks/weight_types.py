"""Loss curves of `otpo pretrain` by the type of its weights, over seeds, on the same documents.

`float32` weights under autocast, `bfloat16` weights with float32 masters, as the command trains them, and
`bfloat16-plain` ones by torch's AdamW, whose moments are bfloat16 and whose small steps are lost. `float32-again` is
the first once more from the same seed: how far two runs part by the order of their sums alone. The documents are a
shopping assistant's, generated, none of them twice in a run. A seed is the model's and that of the documents' order.

    python -m benchmarks.weight_types
    python -m benchmarks.weight_types --seeds 5 --variants float32 float32-again bfloat16
    python -m benchmarks.weight_types --shape compass-tiny --steps 30 --every 5 --seeds 2

Runs are spread over the GPUs. The CSV, which has the losses, is written after each run; a benchmark that was killed
goes on with those that it lacks, of the same tokens. It ends with 1 where a run did not begin with the loss of
`float32`'s of its seed, since curves of other starts are not comparable. The figure has the curves and their
differences from `float32`'s of the same seed.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from benchmarks import harness
from benchmarks.figures import legend, machine_line, save
from benchmarks.launching.processes import names_of_gpus, side_by_side
from benchmarks.pretraining import SHAPES, command
from benchmarks.step_clock import Span
from benchmarks.words import text_tokenizer
from moe_backbone.pretraining import trainer as pretraining
from moe_backbone.pretraining.weight_types import Choice
from otpo.cli.pretrain import main as pretrain
from otpo.data import load_demo_corpus

BASE = "float32"
VARIANTS = {BASE: "float32", "float32-again": "float32", "bfloat16": "bfloat16", "bfloat16-plain": "bfloat16"}
"""The option `dtype` of each."""
DEFAULT = (BASE, "float32-again", "bfloat16")
LAST = 50  # steps of the mean at the end
_SAME_START = 1e-4  # of the first loss: either type of weights, from one start on an H200, was within 4e-5
_TOKENS_OF_A_DOCUMENT = 110  # fewer than those of the corpus have on average, by either tokenizer
Curves = dict[tuple[str, int], dict[int, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs each variant and seed in a process of its own; 1 if one fails."""
    args = parse(arguments)
    if args.child:
        return child(json.loads(args.child))
    console = Console(width=160, highlight=False)
    asked = [(variant, seed) for seed in range(args.seeds) for variant in args.variants]
    devices: SimpleQueue[str] = SimpleQueue()
    names = names_of_gpus() or [""]
    for name in names:
        devices.put(name)
    failed: list[Any] = []

    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), args.shape, args.steps)
        about = {"shape": args.shape, "steps": args.steps, "every": args.every, "data": fingerprint(data["tokens"])}
        about |= harness.describe_machine("transformers")
        rows = kept_rows(args.output, about)
        if others := (len(harness.read_rows(args.output)) if args.output.exists() else 0) - len(rows):
            console.print(f"{others} rows in {args.output} are of other tokens, steps or versions, and are left out")
        done = {(row["variant"], int(row["seed"])) for row in rows}
        missing = [run for run in asked if run not in done]
        if len(missing) < len(asked):
            console.print(f"{len(asked) - len(missing)} of {len(asked)} runs are in {args.output}")

        def run(cell: tuple[str, int]) -> dict[str, Any]:
            device = devices.get()
            try:
                return measure(*cell, args, data, device)
            finally:
                devices.put(device)

        for (variant, seed), found in side_by_side(run, missing, len(names)):
            console.print(line(variant, seed, found))
            if "failed" in found:
                failed.append((variant, seed))
                continue
            told = {"variant": variant, "seed": seed}
            rows.extend(about | told | {"step": step, "loss": loss} for step, loss in found["losses"])
            harness.write_rows(args.output, rows)
    if rows:
        curves = read_curves(rows)
        apart = begin_apart(curves)
        for words in [*findings(curves), *apart]:
            console.print(words)
        console.print(f"{draw(args.output)}\n{args.output}")
        failed += apart
    return int(bool(failed))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="compass-small", choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... up to so many")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="steps of a point, whose mean loss it is")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/weight_types_seeds_SHAPE_GPU.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.steps, args.every, args.seeds) < 1:
        parser.error("--steps, --every and --seeds must be at least 1")
    name = f"weight_types_seeds_{args.shape}_{harness.name_of_machine()}.csv"
    args.output = args.output or Path("benchmarks/results") / name
    return args


def kept_rows(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same steps and tokens on the same machine; the date may be another."""
    if not path.exists():
        return []
    same = [name for name in about if name != "date"]
    return [row for row in harness.read_rows(path) if all(row.get(name) == str(about[name]) for name in same)]


def make_data(folder: Path, shape: str, steps: int) -> dict[str, Path]:
    """More tokenized documents than the steps read, as a Parquet file, and their tokenizer."""
    tiny = shape == "compass-tiny"
    tokens, size = steps * (256 if tiny else 4 * 4096), 500 if tiny else 16_000
    documents = list(load_demo_corpus("train", tokens // _TOKENS_OF_A_DOCUMENT)["text"])
    tokenizer = text_tokenizer(documents[:5000], size)
    encoded: Any = tokenizer(documents, return_attention_mask=False)["input_ids"]
    data = {"tokens": folder / "documents.parquet", "tokenizer": folder / "tokenizer"}
    Dataset.from_dict({"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded]}).to_parquet(data["tokens"])
    tokenizer.save_pretrained(data["tokenizer"])
    return data


def fingerprint(tokens: Path) -> str:
    """Twelve digits that tell a file's documents from others; a Parquet file's own bytes would tell its writer too."""
    ids = Dataset.from_parquet(str(tokens), keep_in_memory=True)["input_ids"]  # pyright: ignore - one split
    digest = hashlib.sha256()
    for document in ids:
        digest.update(array("q", [len(document), *document]).tobytes())
    return digest.hexdigest()[:12]


def measure(
    variant: str, seed: int, args: argparse.Namespace, data: Mapping[str, Path], device: str
) -> dict[str, Any]:
    """Losses, speed and memory of a command line, on one GPU where there is one."""
    words = [*command(args.shape, "default", dict(data), Span(0, args.steps, 0)), "--dtype", VARIANTS[variant]]
    words += ["--logging_steps", str(args.every), "--warmup_steps", str(args.steps // 20), "--seed", str(seed)]
    with tempfile.TemporaryDirectory(dir=data["tokens"].parent) as folder:
        result = Path(folder) / "result.json"
        told = json.dumps({"words": [*words, "--output_dir", folder], "variant": variant, "result": str(result)})
        run = [sys.executable, "-m", "benchmarks.weight_types", "--child", told]
        where = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        ended = subprocess.run(run, check=False, capture_output=True, text=True, env=where)
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


def line(variant: str, seed: int, found: dict[str, Any]) -> str:
    """A run for the terminal."""
    name = f"{variant:<16} seed {seed}"
    if "failed" in found:
        return f"{name}  failed: {found['failed']}"
    peak = "" if found["peak_gib"] is None else f", peak {found['peak_gib']:.1f} GiB"
    return (
        f"{name}  final loss {found['losses'][-1][1]:.4f}, {found['tokens_per_s']:,.0f} tokens/s (median){peak}, "
        f"{found['seconds']:.0f} s"
    )


def read_curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    """Losses by variant and seed, then by step."""
    curves: Curves = {}
    for row in rows:
        curves.setdefault((row["variant"], int(row["seed"])), {})[int(row["step"])] = float(row["loss"])
    return curves


def late(curve: Mapping[int, float]) -> float:
    """The mean loss of the last steps."""
    return statistics.mean(loss for step, loss in curve.items() if step > max(curve) - LAST)


def begin_apart(curves: Curves) -> list[str]:
    """A line for each run whose first loss is not that of float32's of its seed: weights or tokens were others."""
    lines = []
    for (variant, seed), curve in curves.items():
        first, wanted = (next(iter(each.values()), None) for each in (curve, curves.get((BASE, seed), {})))
        if first is not None and wanted is not None and not abs(first - wanted) <= _SAME_START * abs(wanted):
            lines.append(
                f"{variant}, seed {seed}, begins with a loss of {first:.4f} and {BASE} with {wanted:.4f}: they did "
                "not start from the same weights and tokens. Remove the rows of one and run it again."
            )
    return lines


def findings(curves: Curves) -> list[str]:
    """For each variant the late losses of its seeds, and how far they are from float32's of the same seed."""
    found = []
    for variant in dict.fromkeys(name for name, _ in curves):
        of_seeds = {seed: curve for (name, seed), curve in curves.items() if name == variant}
        words = " ".join(f"{late(curve):.4f}" for curve in of_seeds.values())
        apart = [late(curve) - late(curves[BASE, seed]) for seed, curve in of_seeds.items() if (BASE, seed) in curves]
        if variant != BASE and apart:
            words += (
                f"; less {BASE}'s: {' '.join(f'{each:+.4f}' for each in apart)}, mean {statistics.mean(apart):+.4f}"
            )
        found.append(f"{variant:<16} mean loss of the last {LAST} steps, by seed: {words}")
    return found


def draw(path: Path) -> Path:
    """The curves, and below them how far each is from float32's of the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = harness.read_rows(path)
    curves = read_curves(rows)
    figure, panels = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    named: set[str] = set()
    for (variant, seed), curve in curves.items():
        style: dict[str, Any] = {"color": f"C{list(VARIANTS).index(variant)}", "linewidth": 1}
        panels[0].plot(list(curve), list(curve.values()), label=None if variant in named else variant, **style)
        named.add(variant)
        base = curves.get((BASE, seed), {})
        shared = [step for step in curve if step in base]
        if variant != BASE:
            panels[1].plot(shared, [curve[step] - base[step] for step in shared], **style)
    seeds = len({seed for _, seed in curves})
    panels[0].set(ylabel="loss", title=f"otpo pretrain, {rows[0]['shape']}, {seeds} seed(s)")
    panels[1].axhline(0, color="gray", linewidth=0.5)
    panels[1].set(xlabel="step", ylabel="loss - float32's of the seed")
    legend(figure, [panels[0]])
    figure.suptitle(machine_line(rows, "torch", "transformers"))
    return save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
