"""What the pages say was measured is what the committed results say."""

import json
import re
from pathlib import Path

import pytest
from page_blocks import ROOT

from benchmarks import pages
from benchmarks.harness import read_rows
from otpo.weighting.registry import WEIGHTINGS, weightings_table

DOCS = ROOT / "docs"
MEASURED = re.compile(r"\d[\d,.]*(?: ?%|/s\b| (?:ms|s|times|percent|GiB|MiB|tokens/s|seconds|points)\b)")
OTHERS = sorted(
    path for path in DOCS.rglob("*.md") if path.name not in ("performance.md", "ablations.md", "changelog.md")
)


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A page without its code, its links' targets and its line ends."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


@pytest.mark.parametrize("name", sorted(pages.TABLES))
def test_tables_are_the_committed_rows(name):
    page = read("compass.md" if name == "presets" else "performance.md")
    assert " ".join(pages.TABLES[name]().split()) in " ".join(page.split())


@pytest.mark.parametrize("name", sorted(pages.sentences()))
def test_sentences_hold_the_committed_numbers(name):
    assert pages.sentences()[name] in " ".join(read("performance.md").split())


def test_nothing_else_on_the_page_is_a_measured_number():
    text = " ".join(read("performance.md").split())
    for made in (*(make() for make in pages.TABLES.values()), *pages.sentences().values()):
        text = text.replace(" ".join(made.split()), "")
    assert not MEASURED.findall(prose(text))
    assert MEASURED.findall("took 3.5 ms") and MEASURED.findall("1.7 times") and MEASURED.findall("12%")


def test_each_picture_and_file_that_the_page_names_is_there():
    named = set(re.findall(r"\.\./(benchmarks/[\w./-]+)", read("performance.md")))
    assert named and all((ROOT / name).exists() for name in named)


def test_machines_and_dates_are_those_of_the_rows():
    """The line below each table: GPUs, torch, transformers and the day."""
    page = " ".join(read("performance.md").split())
    for name in ("preference_step_h100", "transport_h100", "pretraining_h100", "memcpy_h100", "moe_layer_h100"):
        for row in read_rows(ROOT / f"benchmarks/results/{name}.csv"):
            day = f"{int(row['date'][8:])} November 2026"
            assert row["date"].startswith("2026-11-") and day in page, name
            assert row["torch"].startswith("2.11"), name
            assert "H100" in row["gpu"], name
    for name in ("moe_layer_h200", "moe_layer_h200_gathering_products", "grouped_product_h200"):
        for row in read_rows(ROOT / f"benchmarks/results/{name}.csv"):
            assert (row["date"], row["torch"][:4], row["gpu"]) == ("2026-11-28", "2.11", "NVIDIA H200"), name


def test_sonic_s_rows_are_of_one_run_whose_results_are_right():
    rows = read_rows(ROOT / "benchmarks/results/moe_layer_sonic_h200.csv")
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 8
    for row in rows:
        assert (row["date"], row["torch"][:4], row["gpu"]) == ("2026-11-29", "2.11", "NVIDIA H200")
        assert (row["sonic-moe"], row["quack-kernels"]) == ("0.1.2.post1", "0.3.11")
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    found = {(row["contender"], row["shape"]): row for row in rows}
    rates = [
        f"{float(found[contender, shape]['forward_backward_tflops']):.0f}"
        for contender in ("sonic", "memcpy", "grouped_mm")
        for shape in ("qwen3-30b-a3b", "compass")
    ]
    told = "{} and {} TFLOP/s forward and backward at the first two shapes, memcpy {} and {}, `grouped_mm` {} and {}."
    assert told.format(*rates) in page
    ways = {}
    for (contender, shape), row in found.items():
        forward, both = (float(row[name]) for name in ("forward_ms", "forward_backward_ms"))
        ways[contender, shape] = (forward, both - forward)
    sonic, ours = (ways[contender, "qwen3-30b-a3b"] for contender in ("sonic", "memcpy"))
    assert f"forward pass, {sonic[0]:.2f} ms beside {ours[0]:.2f}" in page and sum(ours) / sum(sonic) > 1.05
    assert f"the backward takes {sonic[1]:.2f} and {ours[1]:.2f} ms" in page
    sonic, ours = (ways[contender, "compass"] for contender in ("sonic", "memcpy"))
    assert f"{ours[0]:.2f} ms beside {sonic[0]:.2f}, and its backward the slower one, {ours[1]:.2f} beside" in page
    assert f"slower one, {ours[1]:.2f} beside {sonic[1]:.2f}." in page and ours[0] < sonic[0]


def test_experts_as_one_operator_reach_their_goals():
    """And each row of the run that the table is made of is that of the whole run, by its name there."""
    path = ROOT / "benchmarks/results"
    rows, run = (read_rows(path / f"moe_layer_h200{end}.csv") for end in ("", "_gathering_products"))
    rates = {(row["shape"], row["contender"]): float(row["forward_backward_tflops"]) for row in rows}
    for shape, least in (("qwen3-30b-a3b", 500), ("compass", 600), ("mixtral-8x7b", 600)):
        assert rates[shape, "memcpy"] >= least
    names = {"memcpy": "fused", "memcpy, separate passes": "memcpy", "memcpy compiled": "memcpy compiled"}
    assert all(row | {"contender": names[row["contender"]]} in run for row in rows) and len(rows) == 9


def test_products_that_gather_paid_too_little():
    rows = [row for row in read_rows(ROOT / "benchmarks/results/grouped_product_h200.csv") if row["alone"]]
    assert all(row["status"] == "ok" for row in rows)
    paid = {(row["shape"].split(",")[0], row["product"]) for row in rows if float(row["ratio"]) > 1}
    assert paid == {("qwen3-30b-a3b", "up"), ("qwen3-30b-a3b", "down_gradient")}
    layers = read_rows(ROOT / "benchmarks/results/moe_layer_h200_gathering_products.csv")
    ms = {(row["shape"], row["contender"]): float(row["forward_backward_ms"]) for row in layers}
    gathering = [key for key in ms if key[1].startswith("fused") and key[1] not in ("fused", "fused compiled")]
    assert len(gathering) == 12 and all(ms[shape, "fused"] / ms[shape, name] < 1.05 for shape, name in gathering)


def test_other_pages_leave_measured_numbers_to_it():
    """A number elsewhere is one of those that are tied below, or of none of our benchmarks."""
    tied = {"quickstart.md": {"7 percent", "95%"}, "serving.md": set()}
    for path in OTHERS:
        found = set(MEASURED.findall(prose(path.read_text(encoding="utf-8"))))
        assert found <= tied.get(path.name, set()), path


def test_the_demo_s_answers_are_those_of_its_report():
    """Three of three runs end with more right answers than they had after fine-tuning."""
    files = [f"road_compass_tiny{name}_cpu.json" for name in ("", "_seed1", "_seed2")]
    reports = [json.loads((ROOT / "benchmarks/results" / file).read_text()) for file in files]
    assert [report["seed"] for report in reports] == [0, 1, 2]
    results = [report["results"] for report in reports]
    assert all(each["pretrain"]["right, all"] < each["sft"]["right, all"] for each in results)
    assert all(each["sft"]["right, all"] + 10 < each["align"]["right, all"] for each in results)
    right = [
        "{:.0f}, {:.0f} and {:.0f}".format(*(each[step]["right, all"] for each in results))
        for step in ("pretrain", "sft", "align")
    ]
    text = (
        f"answers to {reports[0]['scale']['held_out']} new questions were right in {right[0]} percent of cases after "
        f"pretraining, in {right[1]} after fine-tuning, and in {right[2]} after alignment"
    )
    assert text in " ".join(read("quickstart.md").split())


def test_the_table_of_weightings_is_the_registry_s():
    page = read("weightings.md")
    assert weightings_table() in page
    looked_at = page.split("## What each looks at")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", looked_at, re.MULTILINE)) == set(WEIGHTINGS)
    words = {9: "nine", 10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen"}
    assert f"{words[len(WEIGHTINGS) - 1]} other weightings" in read("index.md")


def test_what_was_run_on_gpus_has_its_rows():
    """A row of the launching table that names GPUs has a date and the place of its result; others say `not run`."""
    table = read("launching.md").split("## What was run on GPUs")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"][
        2:
    ]
    assert len(rows) > 10
    for setting, _, gpus, date, where in rows:
        assert gpus == "not run" if not date else (re.match(r"\d", gpus) and "2026" in date and where), setting
    by_name = {(row[0], row[2], row[3]) for row in rows}
    for file, setting, engine in (
        ("preference_step_h100", "one GPU", "single"),
        ("preference_step_h200_x2", "DDP", "ddp"),
        ("preference_step_h200_x2", "ZeRO-3", "zero3"),
    ):
        row = next(row for row in read_rows(ROOT / f"benchmarks/results/{file}.csv") if row["engine"] == engine)
        gpus = f"{row['gpus']} {row['gpu'].split()[1]}"
        assert (setting, gpus, f"{int(row['date'][8:])} November 2026") in by_name


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small_and_shown(path: Path):
    assert path.stat().st_size < 200_000
    assert any(f"pictures/{path.name})" in page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
