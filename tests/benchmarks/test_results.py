"""What the pages say is what the committed results say."""

import re
from pathlib import Path

import pytest

from benchmarks.ablation.report import markdown
from benchmarks.harness import read_rows
from benchmarks.weight_quality.report import markdown as weight_markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ABLATIONS = dict.fromkeys(sorted(RESULTS.glob("ablation_*.csv")), markdown)
QUALITY = dict.fromkeys(sorted(RESULTS.glob("weight_quality_*.csv")), weight_markdown)


def test_there_are_results():
    assert ABLATIONS and QUALITY


@pytest.mark.parametrize("path", [*ABLATIONS, *QUALITY], ids=lambda path: path.stem)
def test_tables_of_the_page_are_the_committed_rows(path):
    table = (ABLATIONS | QUALITY)[path]
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert path.name in page
    assert table(read_rows(path)) in page


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "docs/ablations.md"])
def test_results_that_pages_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"results/([\w.*-]+)", text))
    assert named
    for name in named:
        assert list(RESULTS.glob(f"{name.rstrip('.*')}*")), f"{page} names {name}"
