"""The report of `otpo quantize`: one table, as JSON, as Markdown beside the weights, and in the terminal."""

import json
from pathlib import Path
from typing import Any

REPORT = "quantization_report"
_SHOWN = 5


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table of losses and right answers.

    Args:
        report: Its `models`, one a row.
    """
    metrics = list(dict.fromkeys(metric for row in report["models"] for metric in row.get("answers", {})))
    titles = ["model", "loss", "change", *metrics]
    rows = []
    for row in report["models"]:
        cells = [row["name"], "not measured" if row.get("loss") is None else f"{row['loss']:.4f}"]
        cells.append(_change(row))
        for metric in metrics:
            found = row.get("answers", {}).get(metric)
            cells.append("not asked" if found is None else _interval(found))
        rows.append(cells)
    return titles, rows


def _change(row: dict[str, Any]) -> str:
    if row.get("change") is None:
        return ""
    error = row.get("change_error")
    return f"{row['change']:+.5f}" + ("" if error is None else f" ± {error:.5f}")


def _interval(found: dict[str, Any]) -> str:
    text = f"{found['value']:.3f}"
    return text if found["low"] is None else f"{text} [{found['low']:.3f}, {found['high']:.3f}]"


def draw_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """A line for each draw, and one for each expert that it left short or matrix that got zeros, the first few.

    A single draw stands for both: they took the same documents.
    """
    lines = []
    wanted = report["options"]["min_rows_per_expert"]
    for name, found in report["draws"].items():
        experts, short = found["experts"], found["unfilled"]
        line = f"{found['documents']:,} documents, {found['tokens']:,} tokens; "
        if len(report["draws"]) == 1:
            whole = found["documents"] == found["candidates"]
            line = f"both draws take {'all' if whole else 'the same'} {line}they are not compared; "
        line += (
            f"all {experts:,} experts of all layers have seen {wanted:,} rows or more"
            if not short
            else f"{experts - len(short):,} of {experts:,} experts have seen {wanted:,} rows or more"
        )
        lines.append((name if len(report["draws"]) > 1 else "draws", f"{line}, the least {found['fewest_rows']:,}"))
        told = [_unfilled(entry, wanted) for entry in short[:_SHOWN]]
        told += [f"and {len(short) - _SHOWN:,} more, in {REPORT}.json"] if len(short) > _SHOWN else []
        zeros = [f"{it['what']}: nothing but zeros goes in, so its scale is {it['scale']}" for it in found["zeros"]]
        told += zeros[:_SHOWN]
        told += [f"and {len(zeros) - _SHOWN:,} more of zeros, in {REPORT}.json"] if len(zeros) > _SHOWN else []
        lines += [("", text) for text in told]
    return lines


def _unfilled(entry: dict[str, Any], wanted: int) -> str:
    told = f"layer {entry['layer']} expert {entry['expert']}: {entry['rows']:,} of {wanted:,} rows; "
    told += f"all candidates have {entry['candidates']:,}"
    return told + (", so its scales are its layer's largest" if not entry["rows"] else "")


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes JSON, and Markdown for people."""
    (folder / f"{REPORT}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / f"{REPORT}.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    titles, rows = table(report)
    lines = ["# Quantization report", "", report["scheme"] + ".", ""]
    lines += [_row(titles), _row(["---"] * len(titles)), *map(_row, rows), ""]
    lines += [f"{report['legend']}", ""]
    size = report["bytes"]
    lines += [
        f"Weights: {size['before']:,} bytes before, {size['after']:,} after ({size['after'] / size['before']:.1%}).",
        "",
    ]
    for name, text in draw_lines(report):
        lines.append(f"- {f'`{name}`: ' if name else '  '}{text}")
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
