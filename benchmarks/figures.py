"""What the figures of the benchmarks share: bars by group, panels and legends of whatever was measured.

Any subset of a benchmark's rows can be drawn, none included: a contender may have no time, a shape may not have been
asked for, and a run may have been killed before its first row.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def number(cell: Any) -> float:
    """The number of a cell of a CSV; NaN, which nothing draws, where it is empty or absent."""
    return math.nan if cell in ("", None) else float(cell)


def grouped_bars(panel: Any, groups: Sequence[str], heights: Mapping[str, Sequence[float]], colors: Sequence[str]):
    """Bars of every group side by side, one colour a series, and the groups' names below.

    Args:
        panel: Axes of matplotlib.
        groups: Names of G groups.
        heights: G numbers for each series by its name; NaN is left out.
        colors: One for each series.

    Returns:
        The bars of each series.
    """
    width = 0.8 / max(1, len(heights))
    drawn = []
    for i, (name, of_groups) in enumerate(heights.items()):
        places = [at + (i - (len(heights) - 1) / 2) * width for at in range(len(groups))]
        drawn.append(panel.bar(places, of_groups, width, label=name, color=colors[i]))
    labels = [group.replace(", ", "\n").replace(" backward", "\nbackward") for group in groups]
    panel.set_xticks(range(len(groups)), labels)
    return drawn


def close_empty(panels: Iterable[Any]) -> None:
    """Says so in each panel that shows no number: its scale may be logarithmic, and has no limits then."""
    for panel in panels:
        lines = (line.get_ydata() for line in panel.lines if line.get_transform() == panel.transData)
        heights = (part for bar in panel.patches for part in (bar.get_height(), bar.get_width()))
        if not any(map(math.isfinite, heights if panel.patches else (y for line in lines for y in line))):
            title = panel.get_title()
            panel.clear()
            panel.set_axis_off()
            panel.set_title(title)
            panel.text(0.5, 0.5, "nothing was measured", ha="center", transform=panel.transAxes)


def legend(
    figure: Any, panels: Iterable[Any], loc: str = "outside lower center", most: int = 9, **options: Any
) -> None:
    """One legend for all that any of the panels shows, at `most` so many names in a line."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        figure.legend(list(found.values()), list(found), loc=loc, ncols=min(most, len(found)), **options)


def machine_line(rows: Sequence[Mapping[str, Any]], *packages: str) -> str:
    """GPU, versions of packages and date of the rows; "no rows" where there are none."""
    if not rows:
        return "no rows"
    versions = (f"{name} {'/'.join(dict.fromkeys(row[name] for row in rows))}" for name in packages)
    return ", ".join([rows[0]["gpu"], *versions, rows[0]["date"]])


def save(figure: Any, path: Path) -> Path:
    """Writes the figure of a CSV beside it, as PNG."""
    import matplotlib.pyplot as plt

    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target
