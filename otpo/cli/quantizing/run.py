"""The steps of `otpo quantize`: documents, one pass over them, draws, scales, files, measurements, report."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_backbone.conversion.folders import new_folder
from moe_backbone.conversion.tensors import Tensors
from moe_backbone.quantization.drawing import DRAWS, draw, find_unfilled
from moe_backbone.quantization.observing import Observations, observe
from moe_backbone.quantization.reference import RoundedInputs, load_rounded
from moe_backbone.quantization.scales import InputScales, input_scales, weight_scales
from moe_backbone.quantization.scheme import describe, make_scheme
from moe_backbone.quantization.tapping import tapped
from moe_backbone.quantization.writing import count_bytes, quantized_tensors, write_folder
from otpo.cli.converting.command import parse_size
from otpo.cli.env import installed_version

from . import report as reports
from .documents import batches, read_documents
from .measuring import Answers, change, losses, mean_loss
from .model import Opened, opened

_SERVED = (
    "The losses are those of {documents} held-out documents, {tokens:,} tokens, in nats a token; a change is over the "
)
_SERVED += "model in full precision, ± the standard error over documents. "
_STATIC = (
    "vLLM multiplies all experts of a layer with the largest of their input scales: these rows are computed so, and "
    "the rows 'a scale an expert' with the scales as they are written."
)


@dataclass
class _Run:
    """What the steps hand on."""

    options: argparse.Namespace
    source: Opened
    scheme: Any
    held_out: list[list[int]]
    answers: Answers | None
    models: list[dict[str, Any]] = field(default_factory=list)
    before: list[tuple[float, int]] = field(default_factory=list)

    def measure(self, name: str, inputs: Any = None, ask: bool = True) -> None:
        """A row of the table: the model as it is now, with inputs rounded by a tap where one is given."""
        options, model = self.options, self.source.model
        row: dict[str, Any] = {"name": name, "loss": None}
        with tapped(model, self.source.places, inputs) if inputs is not None else nullcontext():
            if self.held_out:
                with _progress(f"loss, {name}", len(self.held_out)) as done:
                    found = losses(model, self.held_out, options.batch_size, done)
                row["loss"] = mean_loss(found)
                if not self.models:
                    self.before = found
                else:
                    row["change"], row["change_error"] = change(self.before, found)
            if self.answers is not None and ask:
                row["answers"] = self.answers.ask(model)
        self.models.append(row)


def quantize(options: argparse.Namespace) -> None:
    """Runs the command; see `otpo quantize --help`.

    Raises:
        ValueError: Model, documents or options can't be used.
    """
    begin = time.monotonic()
    scheme = make_scheme(options.input_scales)
    static = options.input_scales == "static"
    with opened(options) as source:
        _line("model", f"{source.kind}, {len(source.targets):,} matrices become FP8")
        _line("scheme", describe(options.input_scales))
        train, held_out = [], []
        if options.dataset_name is not None:
            train, held_out = read_documents(options, source.tokenizer, source.model.config.vocab_size)
        answers = None if options.prompts is None else Answers(options, source.tokenizer)
        run = _Run(options, source, scheme, held_out, answers)

        # One pass tells what each document brings to each expert; both draws are choices among them.
        draws: dict[str, Any] = {}
        found: dict[str, InputScales] = {}
        if static:
            with _progress("documents", len(train)) as done:
                observed = observe(source.model, source.places, batches(train, options.batch_size), done)
            taken = {kind: _draw(kind, observed, options) for kind in DRAWS}
            # Draws that take the same documents have the same scales: there is nothing to compare.
            differ = len(set(map(frozenset, taken.values()))) > 1
            for kind in DRAWS if differ else (options.calibration,):
                draws[kind], found[kind] = _drawn(taken[kind], observed, options, scheme)
        if not options.skip_report:
            run.measure("full precision")

        with new_folder(options.out) as folder:
            written = _write(run, found.get(options.calibration), folder)
            if not options.skip_report:
                _measure_rounded(run, written, found)
            report = _report(run, draws, written, time.monotonic() - begin)
            reports.write(report, folder)
    _show(report, options.out)


def _draw(kind: str, observed: Observations, options: argparse.Namespace) -> list[int]:
    share, budget = options.min_rows_per_expert, options.calibration_tokens
    return draw(kind, observed.rows_NLE, observed.tokens_N, share, budget, options.seed)


def _drawn(
    numbers: list[int], observed: Observations, options: argparse.Namespace, scheme: Any
) -> tuple[dict[str, Any], InputScales]:
    """What a draw took, for the report, and the scales that it gives."""
    share = options.min_rows_per_expert
    scales = input_scales(observed, numbers, scheme.input_activations)
    rows_LE = observed.rows_NLE[numbers].sum(0)
    unfilled = find_unfilled(numbers, observed.rows_NLE, observed.layers, share)
    return {
        "documents": len(numbers),
        "candidates": len(observed.tokens_N),
        "tokens": int(observed.tokens_N[numbers].sum()),
        "experts": rows_LE.numel(),
        "fewest_rows": int(rows_LE.min()),
        "unfilled": [entry._asdict() for entry in unfilled],
        "never_seen": [{"layer": layer, "expert": expert} for layer, expert in scales.unseen],
        "zeros": [entry._asdict() for entry in scales.zeros],
        "layers": [
            {
                "layer": layer,
                "rows": rows_LE[place].tolist(),
                **{
                    f"{product}_{name}": values
                    for product in observed.largest
                    for name, values in (
                        ("largest", observed.largest[product][numbers, place].amax(0).tolist()),
                        (
                            "mean_of_rows",
                            (observed.sums[product][numbers, place].sum(0) / rows_LE[place].clamp(min=1)).tolist(),
                        ),
                    )
                },
            }
            for place, layer in enumerate(observed.layers)
        ],
    }, scales


def _write(run: _Run, inputs: InputScales | None, folder: Path) -> Tensors:
    """Writes the folder, and returns its tensors, which are computed anew when they are read."""
    source, options = run.source, run.options
    weights = weight_scales(source.tensors, source.targets, run.scheme.weights)
    written = quantized_tensors(source.tensors, source.targets, run.scheme, weights, inputs)
    size = parse_size(options.max_shard_size)
    write_folder(source.tensors, source.targets, run.scheme, written, source.folder, folder, size)
    return written


def _measure_rounded(run: _Run, written: Tensors, found: dict[str, InputScales]) -> None:
    """The rows of the table after: weights as written, inputs by each draw's scales."""
    source, args = run.source, run.scheme.input_activations
    load_rounded(source.model, source.places, source.targets, written, run.scheme.weights)
    if not found:
        run.measure("FP8", RoundedInputs(args, None))
        return
    chosen = run.options.calibration
    for kind in (chosen, *(kind for kind in found if kind != chosen)):
        name = f"FP8, {kind}" if len(found) > 1 else "FP8"
        written_too = " (written)" if kind == chosen else ""
        run.measure(f"{name}{written_too}", RoundedInputs(args, found[kind].largest_of_layers()))
        run.measure(f"{name}, a scale an expert", RoundedInputs(args, found[kind]), ask=False)


def _report(run: _Run, draws: dict[str, Any], written: Tensors, seconds: float) -> dict[str, Any]:
    options = run.options
    tokens = sum(count for _, count in run.before)
    legend = _SERVED.format(documents=len(run.held_out), tokens=tokens) if run.held_out else ""
    versions = ("otpo", "compressed-tensors", "transformers", "torch")
    return {
        "scheme": describe(options.input_scales),
        "model": options.model,
        "architecture": run.source.kind,
        "models": run.models,
        "legend": legend + (_STATIC if draws and run.models else ""),
        "held_out": {"documents": len(run.held_out), "tokens": tokens},
        "draws": draws,
        "bytes": count_bytes(run.source.tensors, written)._asdict(),
        "options": vars(options),
        "versions": {name: installed_version(name) for name in versions},
        "seconds": round(seconds, 1),
    }


def _show(report: dict[str, Any], out: str) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    for name, text in reports.draw_lines(report):
        _line(name.replace("expert_aware", "aware"), text)
    if report["models"]:
        titles, rows = reports.table(report)
        shown = Table(box=box.HORIZONTALS)
        for place, title in enumerate(titles):
            shown.add_column(escape(title), justify="right" if place else "left", overflow="fold")
        for row in rows:
            shown.add_row(*map(escape, row))
        console = Console()
        console.print(shown)
        console.print(report["legend"], style="dim", markup=False)
    size = report["bytes"]
    _line("weights", f"{size['before']:,} bytes before, {size['after']:,} after, {size['after'] / size['before']:.1%}")
    _line("saved", f"{out}, with {reports.REPORT}.json and .md")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    """A bar with the time left on a terminal, and elsewhere a line at the end; yields what counts are told to."""
    console = Console(soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.monotonic()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
    _line("done", f"{what}: {total:,} documents in {time.monotonic() - begin:.1f} s")


def _line(name: str, value: str) -> None:
    Console(soft_wrap=True).print(f"{name:<10} {value}", highlight=False, markup=False)
