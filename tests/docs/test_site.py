"""The site is built without a warning, and every link and picture in it leads somewhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from page_blocks import ROOT

ADDRESS = "https://example.org/otpo"
NAMES = {
    *("index", "quickstart", "from_dpo", "weightings", "data", "launching", "compass", "memcpy", "performance"),
    *("ablations", "limits", "architecture", "serving", "changelog"),
}


class Page(HTMLParser):
    """The anchors of a page and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links += [value for name in ("href", "src") if (value := found.get(name))]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def build(folder: Path, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder, REPOSITORY_URL=ADDRESS)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.lengthy
def test_every_page_is_there(site):
    for name in NAMES - {"index"}:
        assert (site / name / "index.html").is_file(), name
    assert len(list((site / "reference").glob("*/index.html"))) > 8
    assert not list(site.rglob("*.py"))


@pytest.mark.lengthy
def test_every_link_leads_somewhere(site, pages):
    lost = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if target.startswith(ADDRESS):
                place = target.removeprefix(ADDRESS).strip("/").split("/main/", 1)[-1]
                if not (ROOT / place).exists() or (anchor and anchor not in headings(ROOT / place)):
                    lost.append((path, link))
            elif not target.startswith(("http:", "https:", "data:", "mailto:")):
                found = (path.parent / unquote(target)).resolve() if target else path
                found = found / "index.html" if found.is_dir() else found
                if not found.is_file() or (anchor and found in pages and unquote(anchor) not in pages[found].anchors):
                    lost.append((path, link))
    assert not lost


@pytest.mark.lengthy
def test_nothing_is_fetched_from_elsewhere(pages):
    """Pages ask no other server for fonts, styles or scripts."""
    for path, page in pages.items():
        for link in page.links:
            assert not link.startswith("http") or link.rpartition(".")[2] not in ("js", "css", "woff2", "png"), path


@pytest.mark.lengthy
def test_the_reference_says_what_the_docstrings_say(site):
    text = " ".join("".join(Page(site / "reference/trainer/index.html").text).split())
    assert "Direct preference optimisation whose tokens are weighted by optimal transport" in text
    assert "tokens_per_batch" in text and "[OTPOTrainer]" not in text


@pytest.mark.lengthy
def test_a_mistake_stops_the_build(tmp_path):
    """The check above can fail: each mistake on a page of a small site with our settings ends its build."""
    (tmp_path / "docs/tools").mkdir(parents=True)
    for name in ("links.py", "docstring_links.py"):
        shutil.copy(ROOT / "docs/tools" / name, tmp_path / "docs/tools" / name)
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[0]
    settings = settings.replace("paths: [., kernels]", f"paths: [{ROOT}]")
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav:\n  - index.md\n  - data.md\n", encoding="utf-8")
    (tmp_path / "docs/data.md").write_text("# Data\n\n## Files\n", encoding="utf-8")
    for text, message in (
        ("[there](data.md#files)\n\n::: otpo.config.OTPOConfig", None),
        ("[lost](../benchmarks/no_such_file.md)", "no_such_file"),
        ("[lost](no_such_page.md)", "no_such_page"),
        ("[lost](data.md#no-such-part)", "no-such-part"),
        ("::: otpo.no_such_name", "no_such_name"),
    ):
        (tmp_path / "docs/index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
        done = build(tmp_path / "out", tmp_path)
        assert (done.returncode == 0) is (message is None), done.stderr
        assert message is None or message in done.stderr
