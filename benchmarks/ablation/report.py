"""The table and the figures of a matrix, from its records alone."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_rows

from .cells import Matrix
from .length_control import length_controlled_win_rate
from .run import Results
from .statistics import Indices, paired_bootstrap, summarise
from .training import SPLITS

Columns = dict[str, np.ndarray]
Measure = Callable[[Columns], float]
MEASURES: dict[str, Measure] = {
    "preferred": lambda c: 100 * float(c["preferred"].mean()),
    "preferred_new_wordings": lambda c: 100 * float(c["preferred"][c["split"] == 1].mean()),
    "right": lambda c: 100 * float(c["right"].mean()),
    "win_rate": lambda c: 100 * float(c["wins"].mean()),
    "lc_win_rate": lambda c: (
        100 * length_controlled_win_rate(c["wins"], c["characters"], c["sft_characters"]).win_rate
    ),
    "margin": lambda c: float(c["margin"].mean()),
    "margin_variance": lambda c: float(c["margin"].var()),
    "tokens": lambda c: float(c["tokens"].mean()),
    "length_drift": lambda c: float((c["tokens"] - c["sft_tokens"]).mean()),
}
"""What the table tells, each of one number a held-out prompt, both splits together.

`preferred`: percent of pairs whose right answer is the likelier. `right`: percent of free answers that are right in
everything. `win_rate`, `lc_win_rate`: against the SFT checkpoint's answers, percent; the second controls for length in
characters. `margin`: unweighted log-ratio of the chosen answer less that of the rejected, nats, without beta.
`tokens`: of a free answer; `length_drift`: less the SFT checkpoint's.
"""
COMPARED = ("preferred", "right", "win_rate", "lc_win_rate", "margin", "length_drift")
SHOWN = ("preferred", "right", "win_rate", "lc_win_rate", "margin", "margin_variance", "length_drift")
_RESAMPLES = 500


def columns_of(record: dict[str, Any], sft: dict[str, Any]) -> Columns:
    """One number a prompt of each kind, `(N,)`, both splits one after the other."""

    def of(run: dict[str, Any], name: str) -> np.ndarray:
        return np.concatenate([np.asarray(run["held_out"][split][name], dtype=np.float64) for split in SPLITS])

    def characters(run: dict[str, Any]) -> np.ndarray:
        return np.array([float(len(answer)) for split in SPLITS for answer in run["held_out"][split]["answers"]])

    chosen, rejected = of(record, "chosen"), of(record, "rejected")
    sizes = [len(record["wins"][split]) for split in SPLITS]
    return {
        "preferred": chosen > rejected,
        "margin": chosen - rejected - (of(sft, "chosen") - of(sft, "rejected")),
        "right": of(record, "right"),
        "tokens": of(record, "tokens"),
        "sft_tokens": of(sft, "tokens"),
        "characters": characters(record),
        "sft_characters": characters(sft),
        "wins": np.concatenate([np.asarray(record["wins"][split]) for split in SPLITS]),
        "split": np.repeat(np.arange(len(SPLITS)), sizes),
    }


def table_rows(matrix: Matrix, results: Results) -> list[dict[str, Any]]:
    """One row for each weighting and data: mean and standard deviation over seeds, interval of the difference.

    The interval (95%, paired bootstrap over seeds and prompts) is of the difference to the matrix's baseline, over
    the seeds that both have. What failed has empty columns and its number in `failed`.
    """
    runs = {cell: columns_of(r, results.sft) for cell, r in results.cells.items() if r["status"] == "ok"}
    by_name = {(cell.weighting, cell.data, cell.seed): columns for cell, columns in runs.items()}
    rows = []
    for data in matrix.data:
        for name in matrix.weightings:
            own = {seed: by_name[name, data, seed] for seed in matrix.seeds if (name, data, seed) in by_name}
            base = [by_name.get((matrix.baseline, data, seed)) for seed in own]
            pairs = [(run, other) for run, other in zip(own.values(), base, strict=True) if other is not None]
            row: dict[str, Any] = {"data": data, "weighting": name, "seeds": len(own)}
            row["failed"] = len(matrix.seeds) - len(own)
            for measure in MEASURES:
                values = summarise([MEASURES[measure](run) for run in own.values()]) if own else ("", "")
                row[measure], row[f"{measure}_std"] = map(_rounded, values)
                if measure in COMPARED:
                    compared = pairs and name != matrix.baseline
                    interval = _interval(measure, pairs)[1:] if compared else ("", "")
                    row[f"{measure}_low"], row[f"{measure}_high"] = map(_rounded, interval)
            rows.append(row)
    return rows


def cost_rows(matrix: Matrix, results: Results) -> list[dict[str, Any]]:
    """Median time and memory of a step over seeds, apart from the table, since they are never twice the same."""
    rows = []
    for data in matrix.data:
        for name in matrix.weightings:
            runs = [
                r["training"]
                for c, r in results.cells.items()
                if (c.weighting, c.data) == (name, data) and "training" in r
            ]
            if runs:
                seconds, memory = (statistics.median(r[key] for r in runs) for key in ("step_seconds", "peak_mib"))
                dropped = sum(sum(r["dropped"].values()) for r in runs)
                row = {"data": data, "weighting": name, "ms_per_step": round(1e3 * seconds, 1)}
                rows.append({**row, "peak_mib": round(memory, 1), "dropped_pairs": dropped})
    return rows


def report(matrix: Matrix, results: Results, folder: Path, console: Console) -> None:
    """Writes `table.csv`, `costs.csv` and four figures into the folder, and shows the table and what failed."""
    rows, costs = table_rows(matrix, results), cost_rows(matrix, results)
    write_rows(folder / "table.csv", rows)
    if costs:
        write_rows(folder / "costs.csv", costs)
    table = Table(title=f"Mean ± standard deviation over seeds; [95% interval of the difference to {matrix.baseline}]")
    for name in ("data", "weighting", *SHOWN):
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(row["data"], row["weighting"], *(_cell(row, name) for name in SHOWN))
    console.print(table)
    for cell, why in results.failed.items():
        console.print(f"failed: {cell.name}: {why}", style="red", markup=False)
    if done := [row for row in rows if row["seeds"]]:
        draw(done, costs, folder)
    console.print(f"table and figures: {folder}")


def draw(rows: list[dict[str, Any]], costs: list[dict[str, Any]], folder: Path) -> None:
    """`win_rate_length.png`, `margins.png`, `length_drift.png` and `costs.png`."""
    figure, axis = plt.subplots(figsize=(7, 5))
    for row in rows:
        axis.errorbar(row["tokens"], row["win_rate"], row["win_rate_std"], row["tokens_std"], "o", label=_label(row))
        axis.plot(row["tokens"], row["lc_win_rate"], "x", color=axis.lines[-1].get_color())
    axis.axhline(50, color="#555555", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="tokens of an answer", ylabel="% won against the SFT checkpoint", title="o raw, x length-controlled"
    )
    axis.legend(fontsize=8)
    _save(figure, folder / "win_rate_length.png")
    _bars(rows, {"margin": "margin, nats", "margin_variance": "its variance"}, folder / "margins.png")
    _bars(rows, {"length_drift": "tokens beyond the SFT checkpoint's"}, folder / "length_drift.png")
    _bars(costs, {"ms_per_step": "ms a step", "peak_mib": "peak MiB"}, folder / "costs.png")


def _bars(rows: list[dict[str, Any]], names: dict[str, str], path: Path) -> None:
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 0.4 * len(rows) + 1.5), squeeze=False)
    for axis, (name, label) in zip(axes[0], names.items(), strict=True):
        errors = [row[f"{name}_std"] for row in rows] if f"{name}_std" in rows[0] else None
        axis.barh([_label(row) for row in rows], [row[name] for row in rows], xerr=errors, color="#1f6f8b")
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=5)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _interval(measure: str, pairs: list[tuple[Columns, Columns]]) -> tuple[float, float, float]:
    def difference(seeds: Indices, prompts: Indices) -> float:
        values = []
        for seed in seeds:
            own, other = ({name: c[prompts] for name, c in columns.items()} for columns in pairs[seed])
            values.append(MEASURES[measure](own) - MEASURES[measure](other))
        return float(np.mean(values))

    return paired_bootstrap(difference, len(pairs), len(pairs[0][0]["wins"]), _RESAMPLES)


def _cell(row: dict[str, Any], name: str) -> str:
    if row[name] == "":
        return "failed"
    interval = f"\n\\[{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]" if row.get(f"{name}_low", "") != "" else ""
    return f"{row[name]:.1f} ± {row[f'{name}_std']:.1f}{interval}"


def _label(row: dict[str, Any]) -> str:
    return row["weighting"] if row["data"] == "demo" else f"{row['weighting']}, {Path(row['data']).stem}"


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(value, 4)
