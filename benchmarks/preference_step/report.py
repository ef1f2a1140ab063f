"""What `benchmarks.preference_step` says of its rows: a line each, a verdict, a figure, and what the pages quote."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.figures import close_empty, grouped_bars, legend, machine_line, number, save
from benchmarks.preference_step import agreement, training
from benchmarks.preference_step.cases import AGAIN, CONTENDERS, DENSE, PADDED, SHAPES, TRL, Case

CASE = tuple(name for name in Case._fields if name != "tiny")
COLUMNS = (*CASE, "contender", "status", "steps", *agreement.COLUMNS, *training.COLUMNS, "speedup")
NOT_MEASURED = "not measured"
TARGETS = {("full", 1): 1.25, ("ragged", 1): 2.2, ("ragged", 2): 2.0}
"""Times TRL's real tokens a second, by lengths and GPUs, for the dense model, trained in full with checkpointing."""
PADDED_OVERHEAD = 0.005

Row = Mapping[str, Any]


def case_of(row: Row) -> tuple[str, ...]:
    """What rows of one comparison share."""
    return tuple(str(row[name]) for name in CASE)


def title_of(row: Row) -> str:
    """A comparison in few words."""
    words = [f"{row['lengths']} rows", "every weight" if row["adapter"] == "full" else "LoRA"]
    words += ["checkpointing"] * (row["checkpointing"] == "yes")
    words += [f"{row['engine']} x {row['gpus']}"] * (row["engine"] != "single")
    return ", ".join(words)


def line(row: Row) -> str:
    """A contender's row for the terminal."""
    name = f"{row['contender']:<28}"
    if row["status"] != "ok":
        return f"{name} {row['status']}"
    words = [f"{row['ms']} ms", f"{row['tokens_per_s']} tokens/s"]
    for column, text in (("speedup", "{} x TRL"), ("mfu", "MFU {}"), ("idle_share", "idle {}")):
        words += [text.format(row[column])] if row[column] != "" else []
    if row["peak_mib"] != "":
        words.append(f"{float(row['peak_mib']) / 1024:.1f} GiB")
    return f"{name} " + ", ".join([*words, f"first step {row['first_step_s']} s"])


def _timed(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows that have a time, by comparison and contender."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(case_of(row), {})[row["contender"]] = row
    return found


def _is_target(row: Row) -> bool:
    return row["shape"] == DENSE and row["adapter"] == "full" and row["checkpointing"] == "yes"


def padded_overhead(of_case: Mapping[str, Row]) -> float | None:
    """By how much our step with padded rows is longer than TRL's, as a share of TRL's, the mean of its two times."""
    if not {TRL, PADDED} <= of_case.keys():
        return None
    trl = statistics.fmean(float(of_case[name]["ms"]) for name in (TRL, AGAIN) if name in of_case)
    return float(of_case[PADDED]["ms"]) / trl - 1


def verdict(rows: Sequence[Row], console: Console) -> None:
    """What was reached in each comparison beside what was to be reached."""
    table = Table("model", "rows and training", "target", "measured", "met", title="Verdict")
    for of_case in _timed(rows).values():
        ours = [row for name, row in of_case.items() if name not in (TRL, AGAIN)]
        trl = of_case.get(TRL)
        if trl is None or not ours:
            continue
        best = max(ours, key=lambda row: float(row["tokens_per_s"]))
        ratio = float(best["tokens_per_s"]) / float(trl["tokens_per_s"])
        least = TARGETS.get((trl["lengths"], int(trl["gpus"]))) if _is_target(trl) else None
        text, met = ("tokens/s over TRL", None) if least is None else (f"tokens/s over TRL >= {least}", ratio >= least)
        checks: list[tuple[str, str, bool | None]] = [(text, f"{ratio:.2f}, {best['contender']}", met)]
        if trl["peak_mib"] != "":
            peak = float(best["peak_mib"]) / float(trl["peak_mib"])
            checks.append(("its peak memory over TRL's <= 1", f"{peak:.3f}", peak <= 1))
        overhead = padded_overhead(of_case)
        if overhead is not None:
            text = f"padded rows over TRL's step <= {PADDED_OVERHEAD:.1%}"
            checks.append((text, f"{overhead:+.2%}", overhead <= PADDED_OVERHEAD))
        for target, measured, met in checks:
            table.add_row(trl["shape"], title_of(trl), target, measured, {True: "yes", False: "NO", None: ""}[met])
    console.print(table)
    harness.print_missing([dict(row) for row in rows], ("shape", "contender", "status"), console)


# What the pages quote


def overhead(rows: Sequence[Row]) -> str:
    """The README's line: how much longer our whole step takes than TRL's, padded rows, one GPU, the dense model."""
    words = []
    for of_case in _timed(rows).values():
        share, row = padded_overhead(of_case), next(iter(of_case.values()))
        if share is not None and _is_target(row) and row["engine"] == "single":
            words.append(f"{share:+.2%} ({row['lengths']} rows)")
    return ", ".join(words) or NOT_MEASURED


def markdown(rows: Sequence[Row]) -> str:
    """The table of benchmarks/README.md: TRL's step, and each contender's real tokens a second over TRL's."""
    timed = _timed(rows)
    names = [name for name in CONTENDERS if name != TRL and any(name in of_case for of_case in timed.values())]
    if not names:
        return NOT_MEASURED
    head = ["model", "rows and training", "TRL, ms", *(f"`{name}`" for name in names)]
    lines = [head, ["---"] * len(head)]
    for of_case in timed.values():
        trl = of_case.get(TRL)
        if trl is None:
            continue
        cells = [of_case[name]["speedup"] if name in of_case else "" for name in names]
        lines.append([trl["shape"], title_of(trl), trl["ms"], *cells])
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def draw(path: Path) -> Path:
    """Real tokens a second of each contender, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = harness.read_rows(path)
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    shapes = [name for name in SHAPES if any(row["shape"] == name for row in rows)] or [DENSE]
    # A layout's compiled bar is its paler colour.
    ours = [name for name in CONTENDERS if name not in (TRL, AGAIN, "otpo")]
    colors: dict[str, Any] = dict(zip(ours, plt.get_cmap("tab20").colors, strict=False))  # pyright: ignore
    colors |= {TRL: "black", AGAIN: "gray", "otpo": "tab:olive"}
    figure, grid = plt.subplots(len(shapes), 1, figsize=(13, 3.6 * len(shapes)), squeeze=False, layout="constrained")
    panels = [row[0] for row in grid]
    for panel, shape in zip(panels, shapes, strict=True):
        here = [row for row in rows if row["shape"] == shape]
        groups = list(dict.fromkeys(title_of(row) for row in here))
        found = {(row["contender"], title_of(row)): number(row["tokens_per_s"]) / 1e3 for row in here}
        heights = {name: [found.get((name, group), float("nan")) for group in groups] for name in names}
        for bars in grouped_bars(panel, groups, heights, [colors[name] for name in names]):
            panel.bar_label(bars, fmt="%.1f", fontsize=6, rotation=90, padding=2)
        panel.margins(y=0.2)
        panel.set(title=shape, ylabel="thousand real tokens a second")
    legend(figure, panels, most=6, fontsize=8)
    close_empty(panels)
    figure.suptitle(machine_line(rows, "torch", "transformers", "trl"))
    return save(figure, path)
