"""AUROC of settings and layers that were chosen on other pairs: chosen on one half, reported on the other, both ways.

The best of many settings and layers looks better on the pairs that it was chosen on than it is. Shapes: S scores,
N pairs.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_rows

from .report import Rows, means_of, table_of
from .scores import Found, family

_DIFF = "unmatched"
_HALVES = ("first", "second")


def halves_of(found: Found) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pairs are in which half, `(N,)` bool: every other one of those whose spans leave something to find."""
    counted = ~np.isnan(found.auroc[0]).all(1)
    odd = np.cumsum(counted) % 2 == 1
    return counted & odd, counted & ~odd


def choices(found: Found, model: str, reference: str | None) -> Rows:
    """For each family and half, what the other half chooses, and how well it finds the spans of this one.

    Weights and baselines alone, both sides and all kinds of mistakes. With `unmatched` among the schemes there is also
    the difference to it, response by response, and its interval.

    Args:
        found: AUROC of every score and pair.
        model: The policy's name, for the rows.
        reference: The reference's, likewise.
    """
    places = [place for place, column in enumerate(found.columns) if column.score != "contribution"]
    families = dict.fromkeys(family(found.columns[place].scheme) for place in places)
    diffs = [place for place in places if found.columns[place].scheme == _DIFF]
    halves = halves_of(found)
    rows = []
    for name in families:
        own = [place for place in places if family(found.columns[place].scheme) == name]
        for reported, half in enumerate(_HALVES):
            here, there = halves[reported], halves[1 - reported]
            before = means_of(found.auroc[own][:, there]).mean
            if not here.any() or not there.any():
                continue
            best = own[int(before.argmax())]
            column, means = found.columns[best], means_of(found.auroc[[best]][:, here])
            row: dict[str, Any] = {
                "family": name,
                "reported_on": half,
                "chosen_among": len(own),
                "scheme": column.scheme,
                "layer": "" if column.layer is None else column.layer,
                "where_chosen": round(float(before.max()), 4),
                "responses": means.responses,
                **_rounded(means, "auroc", "low", "high"),
            }
            names = ("over_diff", "over_diff_low", "over_diff_high")
            if diffs:
                over = means_of((found.auroc[[best]] - found.auroc[diffs])[:, here])
                row |= _rounded(over, *names)
            else:
                row |= dict.fromkeys(names, "")
            rows.append({**row, "model": model, "reference": reference or ""})
    return rows


def report_halves(rows: Rows, folder: Path, console: Console) -> None:
    """Writes `halves.csv`, adds a table to the folder's `summary.md` and shows it; nothing without rows."""
    if not rows:
        return
    write_rows(folder / "halves.csv", rows)
    lines = [_line(row) for row in rows]
    with (folder / "summary.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{table_of(lines)}")
    table = Table(title="AUROC on one half of the pairs; setting and layer chosen on the other half [95% interval]")
    for name in lines[0]:
        table.add_column(name)
    for line in lines:
        table.add_row(*(cell.replace("[", "\\[") for cell in line.values()))
    console.print(table)


def _line(row: dict[str, Any]) -> dict[str, str]:
    over = ""
    if row["over_diff"] != "":
        over = f"{row['over_diff']:+.3f} [{row['over_diff_low']:+.3f}, {row['over_diff_high']:+.3f}]"
    return {
        "family": row["family"],
        "half": row["reported_on"],
        "chosen": row["scheme"] + ("" if row["layer"] == "" else f", layer {row['layer']}"),
        "AUROC where chosen": f"{row['where_chosen']:.3f}",
        "AUROC here": f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        "over the diff": over,
    }


def _rounded(means: Any, *names: str) -> dict[str, float]:
    values = (means.mean[0], means.low[0], means.high[0])
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}
