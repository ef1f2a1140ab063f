"""The table and the figures of a matrix, from its records alone."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_rows
from otpo.training.displacement import NOTABLE

from .cells import Matrix
from .length_control import length_controlled_win_rate
from .run import Results
from .statistics import Indices, paired_bootstrap, summarise

Columns = dict[str, np.ndarray]
Measure = Callable[[Columns], float]
MEASURES: dict[str, Measure] = {
    "preferred": lambda c: 100 * float(c["preferred"].mean()),
    "preferred_new_wordings": lambda c: 100 * float(c["preferred"][c["new_wordings"]].mean()),
    "right": lambda c: 100 * float(c["right"].mean()),
    "win_rate": lambda c: 100 * float(c["wins"].mean()),
    "lc_win_rate": lambda c: (
        100 * length_controlled_win_rate(c["wins"], c["characters"], c["sft_characters"]).win_rate
    ),
    "chosen_change": lambda c: float(c["chosen_change"].mean()),
    "margin": lambda c: float(c["margin"].mean()),
    "margin_variance": lambda c: float(c["margin"].var()),
    "tokens": lambda c: float(c["tokens"].mean()),
    "length_drift": lambda c: float((c["tokens"] - c["sft_tokens"]).mean()),
}
"""What the table tells, each of one number a held-out prompt, all splits together.

`preferred`: percent of pairs whose right answer is the likelier. `right`: percent of free answers that are right in
everything. `win_rate`, `lc_win_rate`: against the SFT checkpoint's answers, percent; the second controls for length in
characters. `chosen_change`: log-probability of the chosen answer less the SFT checkpoint's, nats; tables mark a fall.
`margin`: unweighted log-ratio of the chosen answer less that of the rejected, nats, without beta.
`tokens`: of a free answer; `length_drift`: less the SFT checkpoint's.
"""
COMPARED = ("preferred", "right", "win_rate", "lc_win_rate", "margin", "length_drift")
SHOWN = (
    *("preferred", "right", "win_rate", "lc_win_rate"),
    *("chosen_change", "margin", "margin_variance", "length_drift"),
)
NEW_WORDINGS = "test_templates"
"""The held-out split whose wordings no training has seen."""
_RESAMPLES = 500


def columns_of(record: dict[str, Any], sft: dict[str, Any]) -> Columns:
    """One number a prompt of each kind, `(N,)`, one split after the other; those that nobody could tell are absent."""
    splits = list(record["held_out"])

    def of(run: dict[str, Any], name: str) -> np.ndarray:
        return np.concatenate([np.asarray(run["held_out"][split][name], dtype=np.float64) for split in splits])

    def characters(run: dict[str, Any]) -> np.ndarray:
        return np.array([float(len(answer)) for split in splits for answer in run["held_out"][split]["answers"]])

    chosen, rejected = of(record, "chosen"), of(record, "rejected")
    columns = {
        "preferred": chosen > rejected,
        "chosen_change": chosen - of(sft, "chosen"),
        "margin": chosen - rejected - (of(sft, "chosen") - of(sft, "rejected")),
        "tokens": of(record, "tokens"),
        "sft_tokens": of(sft, "tokens"),
        "characters": characters(record),
        "sft_characters": characters(sft),
    }
    if all("right" in record["held_out"][split] for split in splits):
        columns["right"] = of(record, "right")
    if NEW_WORDINGS in splits:
        sizes = [len(record["held_out"][split]["chosen"]) for split in splits]
        columns["new_wordings"] = np.repeat([split == NEW_WORDINGS for split in splits], sizes)
    if record["wins"]:
        columns["wins"] = np.concatenate([np.asarray(record["wins"][split]) for split in splits])
    return columns


def measured(measure: str, columns: Columns) -> float | None:
    """One of [`MEASURES`], or None where it needs a column that is absent."""
    try:
        return MEASURES[measure](columns)
    except KeyError:
        return None


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
            row["failed"] = sum((cell.weighting, cell.data) == (name, data) for cell in results.failed)
            for measure in MEASURES:
                known = [value for run in own.values() if (value := measured(measure, run)) is not None]
                values = summarise(known) if known else ("", "")
                row[measure], row[f"{measure}_std"] = map(_rounded, values)
                if measure in COMPARED:
                    compared = known and pairs and name != matrix.baseline
                    interval = _interval(measure, pairs)[1:] if compared else ("", "")
                    row[f"{measure}_low"], row[f"{measure}_high"] = map(_rounded, interval)
            rows.append(row)
    return rows


def cost_rows(matrix: Matrix, results: Results) -> list[dict[str, Any]]:
    """Median time and memory of a step over seeds, apart from the table, since they are never twice the same.

    Of cells that had the machine for themselves alone.
    """
    rows = []
    for data in matrix.data:
        for name in matrix.weightings:
            runs = [
                r["training"]
                for c, r in results.cells.items()
                if (c.weighting, c.data) == (name, data) and r.get("training", {}).get("alone")
            ]
            if runs:
                seconds, memory = (statistics.median(r[key] for r in runs) for key in ("step_seconds", "peak_mib"))
                dropped = sum(sum(r["dropped"].values()) for r in runs)
                row = {"data": data, "weighting": name, "ms_per_step": round(1e3 * seconds, 1)}
                rows.append({**row, "peak_mib": round(memory, 1), "dropped_pairs": dropped})
    return rows


def start_rows(results: Results) -> list[dict[str, Any]]:
    """What the SFT checkpoint itself prefers and answers, split by split: percentages, and tokens of an answer."""
    rows = []
    for split, found in results.sft["held_out"].items():
        chosen, rejected = np.array(found["chosen"]), np.array(found["rejected"])
        row = {
            "held_out": split,
            "prompts": len(chosen),
            "preferred": round(100 * float((chosen > rejected).mean()), 4),
        }
        row["right"] = round(100 * float(np.mean(found["right"])), 4) if "right" in found else ""
        rows.append({**row, "tokens": round(float(np.mean(found["tokens"])), 4)})
    return rows


def report(matrix: Matrix, results: Results, folder: Path, console: Console) -> None:
    """Writes `table.csv`, `table.md`, `start.csv`, `costs.csv` and figures; shows the table and what failed."""
    rows, costs = table_rows(matrix, results), cost_rows(matrix, results)
    write_rows(folder / "table.csv", rows)
    write_rows(folder / "start.csv", start_rows(results))
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    if costs:
        write_rows(folder / "costs.csv", costs)
    table = Table(title=f"Mean ± standard deviation over seeds; [95% interval of the difference to {matrix.baseline}]")
    for name in ("data", "weighting", *SHOWN):
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(Path(row["data"]).stem, row["weighting"], *(_cell(row, name) for name in SHOWN))
    console.print(table)
    if any("↓" in _cell(row, "chosen_change") for row in rows):
        console.print("↓ Training made the chosen answers less likely: their log-probability fell by 1 nat or more.")
    for cell, why in results.failed.items():
        console.print(f"failed: {cell.name}: {why}", style="red", markup=False)
    if done := [row for row in rows if row["seeds"]]:
        draw(done, costs, folder)
    console.print(f"table and figures: {folder}")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a page: those of [`SHOWN`] that anything is known of, weightings in the order of the rows.

    Args:
        rows: Of [`table_rows`], or as they come back from `table.csv`.
    """
    names = [name for name in SHOWN if any(row.get(name, "") != "" for row in rows)]
    several = _several_data(rows)
    header = [*(["data"] if several else []), "weighting", "seeds", *(name.replace("_", " ") for name in names)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        first = [*([Path(row["data"]).stem] if several else []), row["weighting"], str(row["seeds"])]
        lines.append([*first, *(_cell(row, name).replace("\n\\", "<br>") for name in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: list[dict[str, Any]], costs: list[dict[str, Any]], folder: Path) -> None:
    """`win_rate_length.png`, `margins.png`, `length_drift.png` and `costs.png`."""
    if judged := [row for row in rows if row["win_rate"] != ""]:
        _win_rates(judged, folder / "win_rate_length.png")
    _bars(rows, {"margin": "margin, nats", "margin_variance": "its variance"}, folder / "margins.png")
    _bars(rows, {"length_drift": "tokens beyond the SFT checkpoint's"}, folder / "length_drift.png")
    if costs:
        _bars(costs, {"ms_per_step": "ms a step", "peak_mib": "peak MiB"}, folder / "costs.png")


def _win_rates(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 5))
    for row, label, marker in zip(rows, _labels(rows), itertools.cycle("os^vDP*<>hX"), strict=False):
        axis.errorbar(row["tokens"], row["win_rate"], row["win_rate_std"], row["tokens_std"], marker, label=label)
        colour = axis.lines[-1].get_color()
        axis.plot(row["tokens"], row["lc_win_rate"], marker, color=colour, markerfacecolor="none")
    axis.axhline(50, color="#555555", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="tokens of an answer",
        ylabel="% won against the SFT checkpoint",
        title="filled: raw; hollow: length-controlled",
    )
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _bars(rows: list[dict[str, Any]], names: dict[str, str], path: Path) -> None:
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 0.4 * len(rows) + 1.5), squeeze=False)
    for axis, (name, label) in zip(axes[0], names.items(), strict=True):
        errors = [row[f"{name}_std"] for row in rows] if f"{name}_std" in rows[0] else None
        axis.barh(_labels(rows), [row[name] for row in rows], xerr=errors, color="#1f6f8b")
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

    return paired_bootstrap(difference, len(pairs), len(pairs[0][0]["preferred"]), _RESAMPLES)


def _cell(row: Mapping[str, Any], name: str) -> str:
    if row[name] == "":
        return "" if int(row["seeds"]) else "failed" if int(row["failed"]) else "not run"
    mean, std, low, high = (row.get(f"{name}{end}", "") for end in ("", "_std", "_low", "_high"))
    interval = "" if low == "" else f"\n\\[{float(low):.1f}, {float(high):.1f}]"
    mark = " ↓" if name == "chosen_change" and float(mean) <= -NOTABLE else ""
    return f"{float(mean):.1f} ± {float(std):.1f}{mark}{interval}"


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    several = _several_data(rows)
    return [f"{row['weighting']}, {Path(row['data']).stem}" if several else row["weighting"] for row in rows]


def _several_data(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["data"] for row in rows}) > 1


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(value, 4)
