"""The first two tables of docs/ablations.md, each made from a committed CSV; a test compares the page with them."""

from typing import Any

from benchmarks.headroom.report import markdown
from benchmarks.pages import read, table


def headroom() -> str:
    """Right answers by weighting, for docs/ablations.md."""
    words = ("held_out", "weighting")
    rows: list[dict[str, Any]] = [
        {name: value if name in words or not value else float(value) for name, value in row.items()}
        for row in read("headroom_constraints_h200_summary.csv")
        if row["held_out"] == "all"
    ]
    return markdown(rows, "").strip() + "\n"


def found_spans() -> str:
    """How well `contrast` at its defaults finds the known spans, for docs/ablations.md."""
    rows = [
        (
            row["model"] + (f", from {row['reference']}" if row["reference"] else ""),
            row["reported_on"],
            f"{float(row['auroc']):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]",
            f"{float(row['diff']):.3f}",
            " ".join(("{:+.3f}", "[{:+.3f},", "{:+.3f}]")).format(
                *(float(row[f"over_diff{end}"]) for end in ("", "_low", "_high"))
            ),
        )
        for row in read("contrast_across_h200.csv")
    ]
    return table(("model", "half", "AUROC of `contrast`", "of a diff", "over the diff"), rows)
