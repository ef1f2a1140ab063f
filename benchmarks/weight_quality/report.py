"""The rows, the table and the figure of a run. Shapes: S scores, N pairs, R draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.committed import table
from benchmarks.harness import write_rows
from otpo.data.demo import KINDS

from .scores import LAYERED, SIDES, Found, family

_DRAWS = 1000
_MARKERS = {"reg0.1": "s", "reg0.02": "^"}
Rows = list[dict[str, Any]]


class Means(NamedTuple):
    """Of each of S scores, the mean over responses and its 95% interval, `(S,)`; how many responses there are."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    responses: int


def means_of(values: NDArray[np.float64], draws: int = _DRAWS) -> Means:
    """Means over responses, with percentile intervals of a bootstrap over pairs, whose seed is fixed.

    Args:
        values: `(S, N, sides)`; NaN, for all scores alike, where a response does not count.
        draws: R, >= 1.

    Returns:
        NaN in all of them where no response counts.
    """
    counted = ~np.isnan(values[0])
    values, counted = values[:, counted.any(1)], counted[counted.any(1)]
    size = len(counted)
    if not size:
        nothing = np.full(len(values), np.nan)
        return Means(nothing, nothing, nothing, 0)
    sums, counts = np.nansum(values, axis=2), counted.sum(1)
    times = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=draws)
    low, high = np.quantile((times @ sums.T) / (times @ counts)[:, None], [0.025, 0.975], axis=0)
    return Means(sums.sum(1) / counts.sum(), low, high, int(counts.sum()))


def table_rows(found: Found, model: str, reference: str | None) -> Rows:
    """One row for each score, side (`both` too) and kind (`all` too); empty where no response has both classes."""
    kinds = np.array(found.kinds)
    rows = []
    for number, side in enumerate((*SIDES, "both")):
        for kind in ("all", *KINDS):
            of_kind = np.full(len(kinds), True) if kind == "all" else kinds == kind
            values = found.auroc[:, of_kind, :] if side == "both" else found.auroc[:, of_kind, number : number + 1]
            means = means_of(values)
            for place, column in enumerate(found.columns):
                row = {
                    **column._asdict(),
                    "layer": "" if column.layer is None else column.layer,
                    "last": column.layer == found.last,
                    "side": side,
                    "kind": kind,
                    "responses": means.responses,
                    "left_out": values[0].size - means.responses,
                    "auroc": _rounded(means.mean[place]),
                    "low": _rounded(means.low[place]),
                    "high": _rounded(means.high[place]),
                }
                rows.append({**row, "model": model, "reference": reference or ""})
    return rows


def report(rows: Rows, folder: Path, console: Console) -> None:
    """Writes `weight_quality.csv`, `summary.md` and `weight_quality.png` into the folder and shows the summary."""
    overall = [row for row in rows if row["kind"] == "all"]
    write_rows(folder / "weight_quality.csv", rows)
    (folder / "summary.md").write_text(markdown(rows), encoding="utf-8")
    console.print(_table(rows))
    of_kinds = {row["kind"]: row for row in rows if row["side"] == "both"}
    told = ", ".join(f"{kind} {row['responses']} ({row['left_out']} left out)" for kind, row in of_kinds.items())
    console.print(f"responses: {told}; left out where the span is the whole answer", highlight=False)
    draw(overall, folder / "weight_quality.png")
    console.print(f"table and figure: {folder}", highlight=False)


def draw(overall: Rows, path: Path) -> None:
    """AUROC over layers on both sides, a line a scheme; contributions, where there are any, as bars below."""
    contributions = _of(overall, "contribution", "both")
    size = (12, 9) if contributions else (12, 4.5)
    figure, axes = plt.subplots(2 if contributions else 1, 2, figsize=size, squeeze=False)
    styles = styles_of(list(dict.fromkeys(row["scheme"] for row in overall)))
    for axis, side in zip(axes[0], SIDES, strict=True):
        for name, style in styles.items():
            own = [row for row in overall if row["scheme"] == name and row["side"] == side]
            own = [row for row in own if row["score"] != "contribution" and row["auroc"] != ""]
            if not own:
                continue
            if own[0]["layer"] == "":
                axis.axhline(own[0]["auroc"], linewidth=1.5, label=name, **style)
                continue
            axis.plot([row["layer"] for row in own], [row["auroc"] for row in own], label=name, **style)
        axis.set(xlabel="layer of the hidden states", ylabel="AUROC", title=f"token weights, {side} responses")
        axis.locator_params(axis="x", integer=True)
    if axes[0, 1].lines:
        axes[0, 1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis, side in zip(axes[1] if contributions else (), SIDES, strict=False):
        last = [row for row in _of(overall, "contribution", side) if row["last"] or row["layer"] == ""]
        last = last or _of(overall, "contribution", side)
        last = [row for row in last if row["auroc"] != ""]
        errors = np.abs([[row["auroc"] - row[key] for row in last] for key in ("low", "high")])
        axis.barh(
            [_label(row) for row in last],
            [row["auroc"] for row in last],
            xerr=errors,
            color=[styles[row["scheme"]]["color"] for row in last],
        )
        axis.axvline(0.5, color="#555555", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set(xlabel="AUROC", title=f"contributions to the reward, {side} responses")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def styles_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each scheme is drawn.

    Of those that depend on the layer, the family has a colour, `ot_reg` a marker and the cosine cost a dashed line;
    the pairwise scale, which lies over the release's where distances are large, is a ring around its points. The
    others have colours of their own.
    """
    others = [name for name in names if name not in LAYERED]
    shades, families = plt.get_cmap("turbo"), list(dict.fromkeys(map(family, LAYERED)))
    styles: dict[str, dict[str, Any]] = {
        name: {"color": shades((place + 0.5) / len(others)), "linestyle": ":"} for place, name in enumerate(others)
    }
    for name in (name for name in names if name in LAYERED):
        style = {"color": f"C{families.index(family(name))}", "linestyle": "--" if "cosine" in name else "-"}
        style |= {"marker": next((sign for reg, sign in _MARKERS.items() if name.endswith(reg)), "o"), "markersize": 4}
        if "pairwise" in name:
            style |= {"linestyle": "", "markersize": 8, "markerfacecolor": "none"}
        styles[name] = style
    return {name: styles[name] for name in names}


def summary(rows: Rows) -> list[dict[str, str]]:
    """One line for each scheme and score over all kinds: AUROC at the last layer, and at the best for both sides.

    Args:
        rows: Of [`table_rows`], or as they come back from `weight_quality.csv`.
    """
    rows = [{**row, "last": str(row["last"]) == "True"} for row in rows if row["kind"] == "all"]
    keys = dict.fromkeys((row["scheme"], row["score"]) for row in rows)
    lines = []
    for scheme, score in sorted(keys, key=lambda key: key[1] == "contribution"):
        own = [row for row in rows if (row["scheme"], row["score"]) == (scheme, score)]
        both = [row for row in own if row["side"] == "both"]
        best = max(both, key=lambda row: float(row["auroc"]) if row["auroc"] != "" else -1.0)
        last = next((row for row in both if row["last"] or row["layer"] == ""), None)
        layered = scheme in LAYERED
        line = {"scheme": scheme, "score": score, "last layer": "" if last is None else _cell(last)}
        line |= {"best layer": str(best["layer"]) if layered else "", "AUROC there": _cell(best) if layered else ""}
        for side in SIDES:
            line[side] = next(_three(r["auroc"]) for r in own if (r["side"], r["layer"]) == (side, best["layer"]))
        lines.append(line)
    return lines


def markdown(rows: Rows) -> str:
    """The summary for a page."""
    return table_of(summary(rows))


def table_of(lines: list[dict[str, str]]) -> str:
    """Lines of the same names as a table in Markdown."""
    return table(list(lines[0]), [list(line.values()) for line in lines])


def _table(rows: Rows) -> Table:
    title = "AUROC of the tokens of the known spans [95% interval]; the best layer is chosen on these very pairs"
    table = Table(title=title)
    lines = summary(rows)
    for name in lines[0]:
        table.add_column(name)
    for line in lines:
        table.add_row(*(cell.replace("[", "\\[") for cell in line.values()))
    return table


def _of(rows: Rows, score: str, side: str) -> Rows:
    return [row for row in rows if (row["score"], row["side"]) == (score, side)]


def _label(row: dict[str, Any]) -> str:
    name = "uniform (DPO)" if row["scheme"] == "uniform" else row["scheme"]
    return name if row["last"] or row["layer"] == "" else f"{name}, layer {row['layer']}"


def _cell(row: dict[str, Any]) -> str:
    if row["auroc"] == "":
        return ""
    return f"{_three(row['auroc'])} [{_three(row['low'])}, {_three(row['high'])}]"


def _three(value: float | str) -> str:
    """Three decimals, or nothing of what no response tells."""
    return "" if value == "" else f"{float(value):.3f}"


def _rounded(value: float) -> float | str:
    return "" if np.isnan(value) else round(float(value), 4)
