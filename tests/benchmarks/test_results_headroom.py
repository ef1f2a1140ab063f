"""What docs/ablations.md says of tasks that leave something to gain is what the committed results say."""

from pathlib import Path

import pytest

from benchmarks import findings
from benchmarks.harness import read_rows
from benchmarks.headroom.plan import SHARED

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ENDS, HALVES = ("", "_low", "_high"), ("first", "second")


def test_what_is_said_of_tasks_with_headroom_was_measured():
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    tables = (findings.headroom("constraints"), findings.headroom("shop"), findings.found_spans(), findings.products())
    for made in tables:
        assert f"\n\n{made}" in page
    rows = read_rows(RESULTS / "headroom_constraints_h200_summary.csv")
    last = {(row["held_out"], row["weighting"]): row for row in rows if row["round"] in ("0", "2")}
    gains = [round(float(last[split, "dpo"]["over_start"]), 1) for split in ("all", "test_templates")]
    assert gains == [10.7, 8.0] and "DPO gains 10.7 points, in wordings that no training has seen 8.0" in page
    seeds = [row for row in read_rows(RESULTS / "headroom_constraints_h200.csv") if row["weighting"] == "contrast"]
    right = [100 * int(row["right"]) / 500 for row in seeds if (row["round"], row["held_out"]) == ("2", "all")]
    assert [round(min(right[:4]), 1), round(max(right[:4]), 1), round(right[4], 1)] == [55.8, 60.0, 49.4]
    first = next(row for row in rows if (row["held_out"], row["weighting"], row["round"]) == ("all", "contrast", "1"))
    assert [round(float(first[f"over_dpo{end}"]), 1) for end in ("", "_low", "_high")] == [-3.7, -5.7, -1.8]
    for said in ("3.7 points behind DPO after the first round ([-5.7, -1.8])", "55.8 to 60.0% in four seeds, 49.4%"):
        assert said in " ".join(page.split())


def read_shop(name):
    """A comparison's means after its last round, by split and weighting, and the pairs of DPO's rounds."""
    rows = read_rows(RESULTS / f"headroom_{name}_h200_summary.csv")
    means = {(row["held_out"], row["weighting"]): row for row in rows if row["round"] in ("0", "2")}
    seeds = read_rows(RESULTS / f"headroom_{name}_h200.csv")
    return means, [int(row["pair"]) for row in seeds if (row["weighting"], row["held_out"]) == ("dpo", "all")]


def gains_of(means):
    """DPO's gain, its interval, and its gains in new and in known wordings, rounded as pages have them."""
    found = [float(means["all", "dpo"][f"over_start{end}"]) for end in ("", "_low", "_high")]
    found += [float(means[split, "dpo"]["over_start"]) for split in ("test_templates", "test")]
    return [f"{gain:.1f}" for gain in found]


def behind_dpo(means):
    """Points over DPO and their interval by weighting, the lowest first."""
    rows = [(row, name) for (split, name), row in means.items() if split == "all" and row["over_dpo"]]
    return dict(sorted(((name, ends_of(row)) for row, name in rows), key=lambda item: item[1]))


def ends_of(row):
    return tuple(float(row[f"over_dpo{end}"]) for end in ("", "_low", "_high"))


def test_what_is_said_of_the_shop_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    means, pairs = read_shop("shop")
    start = [float(means[split, "start"]["right"]) for split in ("all", "test", "test_templates")]
    assert "It gets {}% of held-out prompts right, {}% in wordings that it was".format(*start) in page
    assert f"trained on and {start[2]}% in new ones" in page
    assert len(pairs) == 10 and 285 < sum(pairs) / 10 < 295 and "some 290 make a pair" in page
    assert 40 - start[0] == 3 and "three points below the 40 to 70%" in page
    gain, low, _, new, known = gains_of(means)
    assert f"DPO gains {gain} points, the mean of {new} in new wordings and {known} in known ones" in page
    assert float(low) > 0 and float(gain) > 5
    over = behind_dpo(means)
    assert all(low < 0 < high for _, low, high in over.values())
    assert f"`confpo` is highest, by {over['confpo'][0]:.1f} points" in page and list(over)[-1] == "confpo"


def single_intervals(name):
    """As pages tell them, by weighting, round and set of prompts, and which of them leave out zero."""
    rows = [row for row in read_rows(RESULTS / f"headroom_{name}_h200_summary.csv") if row["over_dpo"]]
    found = {(row["weighting"], row["round"], row["held_out"]): ends_of(row) for row in rows}
    told = {key: f"by {abs(points):.1f} [{low:.1f}, {high:.1f}]" for key, (points, low, high) in found.items()}
    return told, {key for key, (_, low, high) in found.items() if low * high > 0}


def test_what_is_said_of_single_intervals_of_the_shop_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    told, clear = single_intervals("shop")
    first, last = (("contrast", number, "all") for number in ("1", "2"))
    new = [("contrast", number, "test_templates") for number in ("1", "2")]
    assert f"Of the {len(told)} intervals of both rounds and all sets of prompts these three leave out zero" in page
    assert clear == {first, *new}
    assert f"wordings are new**, {told[new[1]]}; over all prompts it is {told[last]}." in page
    assert f"first round it is behind {told[first]} over all and {told[new[0]]} in new wordings" in page
    starts = ("shop_other_start", "shop_384", "shop_384_again")
    rounds = {name: {key[1] for key in single_intervals(name)[1] if key[0] == "contrast"} for name in starts}
    assert rounds == {"shop_other_start": {"1"}, "shop_384": set(), "shop_384_again": {"2"}}
    assert {key[1] for key in single_intervals("constraints")[1] if key[0] == "contrast"} == {"1"}
    assert "as well, after the first round, and from two of the three other starts below" in page


def test_what_dpo_gains_alone_in_the_shop_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    means, _ = read_shop("shop_dpo_alone")
    told = "DPO gains {} [{}, {}] points from this start, {} in new wordings and {} in known ones"
    assert told.format(*gains_of(means)) in page
    both, _ = read_shop("shop")
    assert means["all", "start"] == both["all", "start"]
    assert float(means["all", "dpo"]["over_start"]) < 5 < float(both["all", "dpo"]["over_start"])


def test_what_is_said_of_the_shop_from_another_start_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    means, pairs = read_shop("shop_other_start")
    assert f"From a start at {means['all', 'start']['right']}%" in page and len(pairs) == 6
    told = "DPO gained {} [{}, {}] points, {} in new wordings and {} in known ones, with three seeds"
    assert told.format(*gains_of(means)) in page
    over = behind_dpo(means)
    assert all(low < 0 < high for _, low, high in over.values()) and list(over)[:2] == ["otpo", "contrast"]
    assert f"`otpo`, by {-over['otpo'][0]:.1f} points, and `contrast`, by {-over['contrast'][0]:.1f}" in page
    told, clear = single_intervals("shop_other_start")
    assert len(clear) == 5 and "Five other intervals leave it out" in page
    both = [told["contrast", "1", split] for split in ("all", "test")]
    assert "after the first round `contrast` was behind {}, {} in known wordings".format(*both) in page
    new = [told[name, "1", "test_templates"] for name in ("otpo", "budget")]
    assert "in new ones `otpo` was {} and `budget` {}.".format(*new) in page
    assert f"`surprisal` was ahead {told['surprisal', '2', 'test']} in known wordings" in page
    named = {("contrast", "1", "all"), ("contrast", "1", "test"), ("surprisal", "2", "test")}
    assert clear == named | {(name, "1", "test_templates") for name in ("otpo", "budget")}


def test_what_is_said_of_the_shop_s_settings_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    rows = [row for row in read_rows(RESULTS / "headroom_shop_tries_h200.csv") if row["held_out"] == "all"]
    right = {(row["samples"], row["learning_rate"], row["round"]): int(row["right"]) / 5 for row in rows}
    settings = [("4", "2.0e-5"), ("8", "3.0e-5"), ("4", "5.0e-5")]
    best, other, lost = (round(right[*each, "2"] - right[*each, "0"], 1) for each in settings)
    assert f"gained {best} points, 8 answers to a prompt at a rate of 3e-5 gained {other}" in page
    assert f"a rate of 5e-5 lost {-lost}" in page
    seeds = read_rows(RESULTS / "headroom_shop_other_start_h200.csv")
    again = {row["round"]: int(row["right"]) / 5 for row in seeds if of_first_seed(row)}
    assert f"The same command gained {again['2'] - again['0']:.1f} when it ran again with three seeds" in page


def of_first_seed(row):
    return row["held_out"] == "all" and (row["weighting"], row["seed"]) in (("start", ""), ("dpo", "0"))


@pytest.mark.parametrize("name", ["shop_384", "shop_384_again"])
def test_what_is_said_of_the_shop_with_fewer_prompts_was_measured(name):
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    means, pairs = read_shop(name)
    told = "{:.1f}% right it gained {} [{}, {}], {} in new wordings and {} in known ones"
    assert told.format(float(means["all", "start"]["right"]), *gains_of(means)) in page
    assert len(pairs) == 10 and float(means["all", "dpo"]["over_start"]) < 5
    over = behind_dpo(means)
    if name == "shop_384_again":
        assert 110 < sum(pairs) / 10 < 130 and "some 120 prompts a round made a pair" in page
        points, low, high = over.pop("contrast")
        assert f"behind DPO by {-points:.1f} [{low:.1f}, {high:.1f}]" in page and high < 0
        assert f"within {max(abs(each) for each, *_ in over.values()):.1f} of it" in page
    assert all(low < 0 < high for _, low, high in over.values())


def both_sides(name):
    """Rows of a table of AUROC that are of all pairs and both responses, by scheme, layer and score."""
    rows = read_rows(RESULTS / f"weight_quality_{name}.csv")
    of_all = [row for row in rows if (row["side"], row["kind"]) == ("both", "all")]
    return {(row["scheme"], row["layer"], row["score"]): row for row in of_all}


def test_what_is_said_of_contrast_with_compass_tiny_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    found = {key: float(row["auroc"]) for key, row in both_sides("compass_tiny_cpu").items()}
    told = "the default, which is layer 1 of two there, is at {:.3f}, beside {:.3f} of the diff"
    assert told.format(found["contrast-cosine-reg0.1", "1", "weight"], found["unmatched", "", "baseline"]) in page


def test_what_is_said_of_weights_and_contributions_of_smollm2_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    rows = both_sides("smollm2_h200")
    found = {key: float(row["auroc"]) for key, row in rows.items()}
    default, diff = found["contrast-cosine-reg0.1", "24", "weight"], found["unmatched", "", "baseline"]
    assert f"`contrast` is at {default:.3f} on all pairs, beside {diff:.3f} of the diff" in page and default > diff
    last = {
        row["scheme"]: float(row["auroc"])
        for row in rows.values()
        if row["score"] == "contribution" and (row["last"] == "True" or not row["layer"])
    }
    ends = {
        family: (min(each), max(each))
        for family in ("otpo", "contrast")
        if (each := [value for name, value in last.items() if name.startswith(family)])
    }
    told = (
        "at {:.3f} without weights (SmolLM2), at {:.3f} to {:.3f} with transport's, {:.3f} with `confpo` and {:.3f} to"
    )
    assert told.format(last["uniform"], *ends["otpo"], last["confpo"], ends["contrast"][0]) in page
    assert f"to {ends['contrast'][1]:.3f} with `contrast`" in page
    assert f"at {found['contrast-cosine-reg0.1', '24', 'contribution']:.3f} by its default on layer 24" in page


def test_pages_say_which_loss_was_compared():
    """Tables of right answers are of two losses, and a page that calls them DPO says so."""
    assert (SHARED["loss_type"], SHARED["loss_weights"]) == (["sigmoid", "sft"], [1.0, 1.0])
    told = {
        "docs/ablations.md": "The loss is DPO's, its tokens weighted, plus the cross-entropy of the right answer",
        "docs/limits.md": "the loss is DPO's plus the cross-entropy of the right answer",
        "README.md": "the loss has the cross-entropy of the right answer beside DPO's",
    }
    for page, sentence in told.items():
        assert sentence in " ".join((ROOT / page).read_text(encoding="utf-8").split()), page


def test_what_is_said_of_compass_small_after_dpo_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    rows = both_sides("compass_small_h200")
    found = {key: float(row["auroc"]) for key, row in rows.items()}
    default, diff = found["contrast-cosine-reg0.1", "10", "weight"], found["unmatched", "", "baseline"]
    assert f"it is at {default:.3f} beside {diff:.3f}, below the diff by more than the 0.03" in page
    assert diff - default > 0.03
    last = [
        float(row["auroc"])
        for row in rows.values()
        if row["score"] == "contribution" and (row["last"] == "True" or not row["layer"])
    ]
    told = f"at {found['uniform', '', 'contribution']:.3f} and {min(last):.3f} to {max(last):.3f} (compass-small)"
    assert told in page
    last, first = (f"{found['otpo', layer, 'weight']:.3f}" for layer in ("12", "1"))
    assert f"{last} (compass-small; {found['otpo-reg0.02', '12', 'weight']:.3f} at 0.02)" in page
    assert f"layer 1 of compass-small's 12 ({first} against {last})" in page


def test_what_is_said_of_products_was_measured():
    page = " ".join((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8").split())
    for model, last, default in (("smollm2_cpu", "30", "24"), ("compass_tiny_cpu", "2", "1")):
        found = {key: float(row["auroc"]) for key, row in both_sides(model).items()}
        diff = found["unmatched", "", "baseline"]
        assert found["contrast*diff", default, "weight"] < diff < found["otpo*diff", last, "weight"]
    found = {key: float(row["auroc"]) for key, row in both_sides("compass_small_h200").items()}
    layers = [str(layer) for layer in range(13)]
    assert min(found["contrast*diff", layer, "weight"] for layer in layers) > found["unmatched", "", "baseline"]
    best = max(layers, key=lambda layer: found["otpo*diff", layer, "weight"])
    assert best == "1" and f"the first, is at {found['otpo*diff', best, 'weight']:.3f}" in page
    halves = {(row["family"], row["reported_on"]): row for row in read_rows(RESULTS / "halves_compass_small_h200.csv")}
    over = [[float(halves["contrast*diff", half][f"over_diff{end}"]) for end in ENDS] for half in HALVES]
    told = "over the diff by {:.3f} [{:.3f}, {:.3f}] and {:.3f} [{:.3f}, {:.3f}] where"
    assert told.format(*over[0], *over[1]) in page
    assert {f"{float(halves['contrast', half]['auroc']):.3f}" for half in HALVES} == {"0.781"}
    assert "at 0.781 on the other" in page
