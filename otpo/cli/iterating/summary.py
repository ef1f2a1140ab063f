"""What rounds were worth: a table, the same as CSV, and a figure. Needs matplotlib (`pip install 'otpo[plots]'`)."""

import csv
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.table import Table

from .steps import console

COLUMNS: tuple[str, ...] = ("round", "pairs", "ties", "failed", "right", "held_out", "judge_failed")


def show(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table on the console and as `rounds.csv`, and the figure `rounds.png`.

    Args:
        rows: One a round, round 0 first.
        folder: Where the files go.
    """
    table = Table(title="Right answers to held-out prompts")
    for name in ("round", "pairs", "ties", "failed", "right"):
        table.add_column(name, justify="right")
    rates = [100 * row["right"] / row["held_out"] for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        told = f"{row['right']} of {row['held_out']} ({rate:.1f}%)"
        table.add_row(*(str(row[name]) for name in ("round", "pairs", "ties", "failed")), told)
    console.print(table)
    with (folder / "rounds.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    figure, axis = plt.subplots(figsize=(6, 4))
    # The standard error of a share, of the prompts alone.
    errors = [(rate * (100 - rate) / row["held_out"]) ** 0.5 for row, rate in zip(rows, rates, strict=True)]
    axis.errorbar([row["round"] for row in rows], rates, yerr=errors, color="#1f6f8b", marker="o", capsize=3)
    axis.set_xticks([row["round"] for row in rows])
    axis.set_xlabel("round")
    axis.set_ylabel("right answers to held-out prompts, %")
    figure.tight_layout()
    figure.savefig(folder / "rounds.png", dpi=120)
    plt.close(figure)
    console.print(f"table       {folder / 'rounds.csv'}\nfigure      {folder / 'rounds.png'}")
