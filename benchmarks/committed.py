"""The committed rows of [`RESULTS`], and tables in Markdown, for what makes pages of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import read_rows

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, str]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def read(*names: str) -> list[dict[str, str]]:
    """The rows of committed files, one after the other."""
    return [row for name in names for row in read_rows(RESULTS / name)]
