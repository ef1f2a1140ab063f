"""What the pages say is what the committed results say."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import findings, weight_types
from benchmarks.ablation.report import markdown
from benchmarks.harness import read_rows
from benchmarks.preference_step import report as steps
from benchmarks.readme_tables import honest_table, speed_table
from benchmarks.sized_alignment.sizes import LAYERS, Case, fitting_layers, peak_of
from benchmarks.sized_alignment.yardsticks import YARDSTICKS, arithmetic
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


@pytest.mark.parametrize("table", [honest_table, speed_table])
def test_tables_of_the_readme_are_the_committed_rows(table):
    assert table().count("\n") >= 7
    assert f"\n\n{table()}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_papers_numbers_are_the_same_on_both_pages():
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "DPO scores 48.14, uniform\nweights under OTPO's budget 52.60, OTPO 53.37" in page


def test_what_is_said_of_the_demo_was_measured():
    paths = list(RESULTS.glob("road_compass_tiny*_cpu.json"))
    seconds = [json.loads(path.read_text(encoding="utf-8"))["seconds"]["all"] for path in paths]
    assert len(seconds) == 3 and [round(each / 60) for each in seconds] == [2, 2, 2]
    assert "in two to three minutes" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_is_said_of_the_whole_step_was_measured():
    """Until it is, the pages say that it was not."""
    path = RESULTS / "preference_step_h100.csv"
    rows = read_rows(path) if path.exists() else []
    assert f"**{steps.overhead(rows)}**" in (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = page.split("## A whole preference step\n")[1].split("\n## ")[0]
    assert f"\n\n{steps.markdown(rows)}\n" in section


def test_what_is_said_of_llama_cpp_was_measured():
    rows = read_rows(RESULTS / "llama_cpp_answers_cpu.csv")
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f"logits within {max(float(row['difference']) for row in rows)} of" in page
    assert f"(spread {min(float(row['spread']) for row in rows)} or more)" in page
    assert f"{sum(int(row['equal']) for row in rows)} of {sum(int(row['tokens']) for row in rows)} greedy" in page


def test_what_is_said_of_draws_for_fp8_was_measured():
    rows = read_rows(RESULTS / "quantization_draws_cpu.csv")
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    (reachable,) = {int(row["reachable"]) for row in rows}
    few = [row for row in rows if row["tokens"] == "500"]
    aware, even = ([row for row in few if row["draw"] == kind] for kind in ("expert_aware", "uniform"))
    filled = [sorted(int(row["filled"]) for row in part) for part in (aware, even)]
    assert f"fill {filled[0][0]} experts and leave none of the {reachable} unseen" in page
    assert all(int(row["seen"]) == reachable for row in aware)
    unseen = sorted(reachable - int(row["seen"]) for row in even)
    assert f"fill {filled[1][0]} to {filled[1][-1]} and leave {unseen[0]} to {unseen[-1]} unseen" in page
    assert {filled[0][0], filled[0][-1]} == {22}
    moved = max(abs(float(row[f"change_{name}"])) for row in few for name in ("served", "own_scales"))
    assert f"by {moved:.4f} nats at most" in page
    assert f"error of {max(float(row['error_served']) for row in few):.4f}" in page


def test_what_is_said_of_the_cost_of_weightings_was_measured():
    page = (RESULTS.parent / "README.md").read_text()
    timed = [row for row in read_rows(RESULTS / "weighting_cost_h200.csv") if row["status"] == "ok"]
    assert f"at most {100 * max(float(row['share']) for row in timed):.2f}%" in page
    assert f"{len(timed)} of {len(read_rows(RESULTS / 'weighting_cost_h200.csv'))}" in page


def test_what_is_said_of_pretraining_was_measured():
    rows = {(row["shape"], row["variant"]): row for row in read_rows(RESULTS / "pretraining_h100.csv")}
    page = (RESULTS.parent / "README.md").read_text()
    for (shape, variant), row in rows.items():
        assert row["status"] == "ok"
        numbers = (row["ms"], f"{int(row['tokens_per_s']):,}", row["mfu"], f"{int(row['peak_mib']) / 1024:.1f}")
        assert f"| {variant} | {' | '.join(numbers)} |" in page, (shape, variant)
    fast = int(rows["compass-small", "default"]["tokens_per_s"])
    newer = read_rows(RESULTS / "pretraining_h200.csv")[1]
    assert (newer["shape"], newer["variant"]) == ("compass-small", "default")
    assert f"{fast:,} tokens/s for compass-small on an H100, {int(newer['tokens_per_s']):,} on an H200" in page
    assert rows["compass-small", "default"]["speedup"] == "1.7" and "1.70 and 1.20 times" in page


def test_what_is_said_of_power_was_measured():
    page = " ".join((RESULTS.parent / "README.md").read_text().split())
    found = {}
    for row in read_rows(RESULTS / "pretraining_h200_clocks.csv"):
        numbers = (float(row["watts"]), float(row["sm_mhz"]), int(row["at_power_limit"]))
        found.setdefault(row["variant"], []).append(numbers)
    (watts, clock, _), (other_watts, other_clock, _) = (
        [statistics.median(each) for each in zip(*found[variant], strict=True)]
        for variant in ("default", "grouped_mm")
    )
    assert f"it draws {watts:.0f} W of 700 and has {clock:,.0f} MHz" in page
    assert f"`grouped_mm` draws {other_watts:.0f} W and has {other_clock:,.0f} of 1,980 MHz" in page
    limited = [sum(row[2] for row in found[variant]) / len(found[variant]) for variant in ("default", "grouped_mm")]
    assert "clock in {:.0%} of the default's and {:.0%} of the other's".format(*limited) in page


def test_what_is_said_of_a_step_s_kernels_was_measured():
    page = " ".join((RESULTS.parent / "README.md").read_text().split())
    rows = [row for row in read_rows(RESULTS / "pretraining_h200.csv") if row["shape"] == "compass-small"]
    assert [row["variant"] for row in rows[:2]] == ["grouped_mm", "default"]
    means = [16384e3 / int(row["tokens_per_s"]) for row in rows[:2]]
    assert f"first step took {float(rows[1]['first_step_s']):.0f} s with a cold cache" in page
    slow, fast = (mean * (1 - float(row["idle_share"])) for mean, row in zip(means, rows, strict=False))
    assert f"step take {fast:.1f} and {slow:.1f} ms, {slow / fast:.2f} times" in page
    assert f"mean step is {16384e3 / 164_296 - means[1]:.1f} ms shorter (164,296 tokens/s)" in page

    kinds = {"GroupProblem": "experts", "flash_": "attention", "_update": "optimizer", "swiglu": "SwiGLU"}
    took = dict.fromkeys(kinds.values(), 0.0)
    lines = [
        line.split(maxsplit=3)
        for line in (RESULTS / "pretraining_h200_compass-small_default.txt").read_text().splitlines()[1:]
    ]
    for ms, _, _, kernel in lines:
        for part in kinds:
            if part in kernel:
                took[kinds[part]] += float(ms)
    whole = sum(float(ms) for ms, *_ in lines) / sum(float(share.rstrip("%")) for _, share, *_ in lines)
    told = "products of experts are {:.0f}%, attention {:.0f}%, the optimizer {:.0f}%, SwiGLU {:.0f}%"
    assert told.format(*(ms / whole for ms in took.values())) in page
    calls = {kernel: float(ms) / int(count) for ms, _, count, kernel in lines if "_cross_entropy" in kernel}
    forward, backward = (calls[f"_cross_entropy{name}_kernel"] for name in ("", "_backward"))
    assert f"kernels of cross-entropies take {forward:.2f} and {backward:.2f} ms in the step above" in page


def test_what_is_said_of_bfloat16_weights_was_measured():
    page = " ".join((RESULTS.parent / "README.md").read_text().split())
    rows = {(row["shape"], row["variant"]): row for row in read_rows(RESULTS / "pretraining_h200.csv")}
    timed = {key: row for key, row in rows.items() if row["status"] == "ok"}
    assert rows.keys() == timed.keys()
    for key, row in timed.items():
        assert f"{int(row['tokens_per_s']):,}" in page, key
    wide = [timed["compass-v3-width", name] for name in ("default", "grouped_mm")]
    learnt = [float(row["first_loss"]) - float(row["loss"]) for row in wide]
    assert "{:.3f} and {:.3f}, does not agree".format(*learnt) in page
    assert f"MFU {float(wide[0]['mfu']):.2f}, and" in page and float(wide[0]["mfu"]) > 0.5
    (again,) = read_rows(RESULTS / "pretraining_h200_again.csv")
    assert again["first_loss"] == wide[1]["first_loss"]
    other = float(again["first_loss"]) - float(again["loss"])
    assert f"`grouped_mm` learnt {other:.3f} on another H200" in page
    assert f"better than {learnt[0] / learnt[1] - 1:.0%}. One command" in page
    assert f"differs from itself by {learnt[1] / other - 1:.0%}:" in page
    assert f"{float(rows['compass-small', 'default']['speedup']):.2f} times `grouped_mm` with the same weights" in page
    four = [timed["compass-v3-width-4-layers", name] for name in ("default", "grouped_mm")]
    learnt = [float(row["first_loss"]) - float(row["loss"]) for row in four]
    apart = 1 - learnt[0] / learnt[1]
    assert "is learnt in 31 steps, {:.3f} and {:.3f}, agrees to {:.0%}".format(*learnt, apart) in page
    for row, words in zip(four, ("MFU {:.2f}, {:.1f} GiB, and", "MFU {:.2f}, {:.1f} GiB (`--shapes"), strict=True):
        assert words.format(float(row["mfu"]), int(row["peak_mib"]) / 1024) in page
    of_class, ours = (timed["qwen3-30b-a3b-4-layers", name] for name in ("transformers", "default"))
    assert f"{int(ours['tokens_per_s']) / int(of_class['tokens_per_s']):.1f} times the class" in page
    assert abs(float(ours["loss"]) / float(of_class["loss"]) - 1) < 5e-5 and "the same to 0.005%" in page

    curves = weight_types.read_curves(read_rows(RESULTS / "weight_types_seeds_compass-small_h200.csv"))
    ends = {key: weight_types.late(curve) for key, curve in curves.items()}
    plain = [ends["float32", seed] for seed in range(3)]
    assert f"is {plain[0]:.4f}, {plain[1]:.4f} and {plain[2]:.4f} with float32" in page
    again = [f"{ends['float32-again', seed] - plain[seed]:+.4f}" for seed in range(3)]
    assert f"{again[0]}, {again[1]} and {again[2]} away from that" in page
    halves = [ends["bfloat16", seed] for seed in range(3)]
    assert "it is {:.4f}, {:.4f} and {:.4f}, in the mean".format(*halves) in page
    six = [ends[variant, seed] for variant in ("float32", "float32-again") for seed in range(3)]
    means = [sum(each) / len(each) for each in (halves, six)]
    assert f"in the mean {means[0]:.4f}" in page and abs(means[0] - means[1]) < 2e-4
    first = [abs(curves["bfloat16", seed][1] - curves["float32", seed][1]) for seed in range(3)]
    assert (
        "first losses are {1:.4f} and {2:.4f} from those of the seed, and {0:.4f} in the third".format(*first) in page
    )
    assert len(weight_types.begin_apart(curves)) == 2


def test_what_is_said_of_the_small_road_was_measured():
    page = " ".join((RESULTS.parent / "README.md").read_text().split())
    road = json.loads((RESULTS / "road_compass_small_h200.json").read_text(encoding="utf-8"))
    seconds = road["seconds"]
    steps = ", ".join(
        f"{name} {seconds[step]:.0f}"
        for name, step in (("fine-tuning", "sft"), ("own pairs", "pairs"), ("alignment", "align"))
    )
    checks = sum(value for step, value in seconds.items() if step.endswith("checks"))
    assert f"{seconds['all']:.0f} s, of them pretraining {seconds['pretrain']:.0f}" in page
    rest = 2 * seconds["all"] - sum(seconds.values())
    assert f"{steps}, checks {checks:.0f}, data and a tokenizer {seconds['data']:.0f}, and the picture and" in page
    assert f"the pages of `otpo explain` {rest:.0f}" in page
    first, before, after = (road["results"][step]["right, all"] for step in ("pretrain", "sft", "align"))
    assert f"right in {after:.1f}% of 252 products and was in {before:.1f}% before, three answers fewer" in page
    assert round(2.52 * after) - round(2.52 * before) == 3
    assert f"and in {first:.1f}% after pretraining" in page
    of_first = json.loads((RESULTS / "road_compass_small_h100.json").read_text(encoding="utf-8"))["seconds"]
    assert f"takes {seconds['all'] / of_first['all']:.2f} of it" in page


def test_what_is_said_of_the_launch_matrix_was_measured():
    rows = read_rows(RESULTS / "launch_matrix_h200_x2.csv")
    assert len(rows) == 78 and all(row["status"] == "ok" for row in rows)
    assert max(float(row["difference"]) for row in rows) < 3e-6 and {row["gpus"] for row in rows} == {"2"}
    assert "78 rows, all within 3e-6 of it" in " ".join((ROOT / "docs" / "launching.md").read_text().split())


@pytest.mark.parametrize(("machine", "more"), [("cpu", set()), ("h200_x2", {"fsdp2"})])
def test_what_is_said_of_kills_was_measured(machine, more):
    rows = read_rows(RESULTS / f"random_kills_{machine}.csv")
    assert {row["schedule"] for row in rows} == {"linear"}  # a constant rate would hide what a resumed run's is
    assert len(rows) == 20 and {row["status"] for row in rows} == {"ok"}
    assert {row["gpus"] for row in rows} == {"2" if more else "0"}
    assert {(float(row["losses"]), float(row["weights"])) for row in rows} == {(0.0, 0.0)}
    assert {(float(row["noise_losses"]), float(row["noise_weights"])) for row in rows} == {(0.0, 0.0)}
    engines = {"ddp", "experts-transformers", "experts-zero1", "experts-zero2", "experts-zero3"} | more
    assert {(row["engine"], row["adapter"]) for row in rows} == {(e, a) for e in engines for a in ("full", "lora")}
    page = " ".join((ROOT / "docs" / "launching.md").read_text(encoding="utf-8").split())
    assert "spread over all engines on two GPUs, and over all but FSDP2 on CPU processes. Each of them" in page
    text = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{findings.kills()}\n" in text
    assert "20 of 20 on two GPUs and on CPU processes, to the same bits" in text
    section = " ".join(text.split("## Trainings killed and resumed\n")[1].split("\n## ")[0].split())
    parts = [row["part"] for row in rows]
    training, end = parts.count("training"), parts.count("end")
    drawn = f"{training} of each 20 moments were drawn for training, {end} for the time after"
    assert drawn in section and len(set(parts)) == 2
    late = sum(row["part"] == "training" and row["phase"] == "after the last checkpoint" for row in rows)
    assert not more or f"On the GPUs {late} of the 12 found" in section
    saving = sum(row["phase"] == "while saving a checkpoint" for row in rows)
    assert saving == 0 if more else f"; {saving} on the CPU did" in section


def test_what_is_said_of_alignment_at_size_was_measured():
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    section = page.split("## Alignment at size\n")[1].split("\n## ")[0]
    assert f"\n\n{findings.at_size()}\n" in section
    said = " ".join(section.split())
    rows = {(row["adapter"], int(row["layers"])): row for row in read_rows(RESULTS / "alignment_at_size_h200_x2.csv")}
    lora, full, failed = rows["lora", LAYERS], rows["full", 9], rows["full", 19]
    assert f"LoRA of all {LAYERS} layers on two H200: {int(lora['tokens_per_s']):,} tokens/s" in page
    assert {float(row["first_loss"]) for row in (lora, full)} == {0.693147}
    assert {row["tokens_per_step"] for row in rows.values()} == {"32768"} and "32,768 tokens a step" in said
    assert f"had been counted to fit, at {float(failed['planned_gib']):.1f} GiB" in said
    counted = Case("full", 1, gpus=2, pairs=8, prompt=512, response=512, tiny=False)
    now = [f"{peak_of(counted._replace(layers=layers)) / 2**30:.1f}" for layers in (19, 9)]
    assert (
        f"the count is {now[0]} GiB for 19 layers of the 140 that there are" in said
        and f"{now[1]} for 9, where" in said
    )
    day, taken = float(full["planned_gib"]), float(full["peak_gib"])
    assert f"where {day:.1f} had been counted on the day and {taken:.1f} were taken" in said
    assert f"{fitting_layers(counted, 140 * 2**30)} layers are counted to fit" in said
    for row in (lora, full):  # the program's own arithmetic
        lines = " ".join(arithmetic([row]))
        (ratio,) = re.findall(r"ours has 16,384: (.*? s)(?: at most)?, were 8 GPUs", lines)
        assert (ratio if row is lora else ratio.split(" = ")[1]) in said
    assert re.findall(r"in them: (.*? s at most)", " ".join(arithmetic([full])))[0] in said
    for yardstick in YARDSTICKS:
        assert f"{yardstick.seconds:g} s" in said and str(yardstick.gpus) in said


def test_the_table_of_benchmarks_names_what_is_committed():
    table = (RESULTS.parent / "README.md").read_text().split("\n## ")[0]
    rows = {found[1]: line for line in table.splitlines() if (found := re.search(r"-m benchmarks\.(\w+)", line))}
    assert len(rows) > 10
    for name, line in rows.items():
        committed = any(RESULTS.glob(f"{name}_*.csv"))
        assert not (committed and re.search(r"\| not measured", line)), name
        assert committed or "not measured yet" in line or not re.search(rf"results/{name}_", line), name
