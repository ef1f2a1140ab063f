"""Spans of characters as labels of tokens, the area under the curve by hand, and the command from end to end."""

import csv
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
import torch
from helpers import make_tokenizer
from transformers.utils import logging

from benchmarks.weight_quality import __main__, across, scores
from benchmarks.weight_quality.halves import choices, halves_of
from benchmarks.weight_quality.labels import auroc, token_labels
from benchmarks.weight_quality.report import means_of
from benchmarks.weight_quality.scores import CONTRAST, PRODUCTS, SCHEMES, Column, Found, Scorer, resolve_layers
from otpo import OTPOConfig, OTPOTrainer
from otpo.data import load_demo_preferences
from otpo.data.token_values import unmatched
from otpo.explain import explain_rows

# Labels


def labelled(text, spans, *, before="", after="<|end|>"):
    tokenizer = make_tokenizer()
    ids = tokenizer(before + text + after, add_special_tokens=False)["input_ids"]
    labels = token_labels(tokenizer, ids, text, spans)
    assert len(labels.in_span) == len(labels.in_answer) == len(ids)
    texts = [tokenizer.decode([number for number, kept in zip(ids, of, strict=True) if kept]) for of in labels]
    return labels, *texts


def test_labels_are_the_spans_tokens():
    labels, in_span, in_answer = labelled("the red shirt costs 12 dollars", [[20, 22]])
    assert (in_span.strip(), in_answer) == ("12", "the red shirt costs 12 dollars")
    assert labels.searchable and not labels.in_answer[-1]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("รายละเอียดของ Pravio K3384 ระบุวัสดุว่าแก้วใสค่ะ", "แก้วใส"),
        ("ราคา ฿3,856 ค่ะ", "฿3,856"),
        ("ready 👍🏽 to ship 🚀 today", "👍🏽"),
        ("family 👨‍👩‍👧 box", "box"),
    ],
    ids=["thai", "baht", "skin_tone", "joined"],
)
@pytest.mark.parametrize("before", ["", "\n"])
def test_labels_of_signs_in_several_tokens(text, part, before):
    begin = text.index(part)
    labels, in_span, in_answer = labelled(text, [[begin, begin + len(part)]], before=before)
    # A token may reach over the span's ends, as one of the space before it and the first sign does.
    assert in_span.strip() == part
    assert in_answer.strip() == text
    assert 0 < labels.in_span.sum() < labels.in_answer.sum()


def test_templates_may_strip_an_answer():
    tokenizer = make_tokenizer()
    ids = tokenizer("red box<|end|>", add_special_tokens=False)["input_ids"]
    labels = token_labels(tokenizer, ids, "\n red box ", [[2, 5]])
    assert tokenizer.decode([n for n, kept in zip(ids, labels.in_span, strict=True) if kept]).strip() == "red"
    with pytest.raises(ValueError, match="does not hold the answer 'blue box': its spans can't be found"):
        token_labels(tokenizer, ids, "blue box", [[0, 4]])


def test_answers_that_are_wrong_as_a_whole_are_not_searched():
    labels, _, _ = labelled("the red shirt", [[0, 13]])
    assert not labels.searchable and labels.in_span.any() and not labels.in_span[-1]
    assert not labelled("the red shirt", [])[0].searchable


def test_bundled_spans_are_found_in_every_language():
    tokenizer = make_tokenizer()
    for row in load_demo_preferences("test", kinds=["attribute", "price"]).shuffle(seed=0).take(40):
        for side in ("chosen", "rejected"):
            answer, spans = row[side][0]["content"], row[f"{side}_spans"]
            labels, in_span, in_answer = labelled(answer, spans)
            assert labels.searchable and in_answer == answer
            assert answer[spans[0][0] : spans[0][1]] in in_span
    assert tokenizer.is_fast


def test_unmatched_is_a_plain_diff():
    assert unmatched([1, 2, 3, 9], [1, 5, 3, 9, 9]).tolist() == [0, 1, 0, 0]
    assert unmatched([1, 5, 3, 9, 9], [1, 2, 3, 9]).tolist() == [0, 1, 0, 0, 1]
    assert unmatched([1], []).tolist() == [1]


# The area under the curve


@pytest.mark.parametrize(
    ("scores", "positive", "want"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([1, 2, 3], [0, 1, 1], 1.0),
        ([3, 2, 1], [0, 1, 1], 0.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
        ([0, 0, 1], [1, 0, 0], 0.25),
    ],
)
def test_auroc_by_hand(scores, positive, want):
    assert auroc(np.array(scores, float), np.array(positive, bool)) == want


def test_auroc_of_many_scores_and_of_one_class():
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 5, (3, 2, 40)).astype(float), generator.random(40) < 0.3
    got = auroc(scores, positive)
    assert got.shape == (3, 2)
    ranks = np.array([[(row < s).sum() + ((row == s).sum() + 1) / 2 for s in row] for row in scores.reshape(6, 40)])
    count = positive.sum()
    want = (ranks[:, positive].sum(1) - count * (count + 1) / 2) / (count * (40 - count))  # by midranks
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-12)
    np.testing.assert_allclose(got + auroc(scores, ~positive), 1)
    assert np.isnan(auroc(scores, np.ones(40, bool))).all() and np.isnan(auroc(scores, np.zeros(40, bool))).all()


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score  # pyright: ignore

    generator = np.random.default_rng(1)
    scores, positive = generator.integers(0, 9, 100).astype(float), generator.random(100) < 0.4
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_means_over_responses():
    values = np.array([[[0.2, 0.4], [np.nan, 0.9], [np.nan, np.nan]], [[1.0, 1.0], [np.nan, 1.0], [np.nan, np.nan]]])
    means = means_of(values)
    np.testing.assert_allclose(means.mean, [0.5, 1.0])
    assert means.responses == 3
    np.testing.assert_allclose([means.low[0], means.high[0]], [0.3, 0.9])  # one pair or the other alone
    np.testing.assert_allclose([means.low[1], means.high[1]], 1.0)
    assert np.isnan(means_of(np.full((2, 3, 1), np.nan)).mean).all()


# The command


def command(folder, model, *options):
    """The command's exit code; it leaves no logger silenced."""
    verbosity = logging.get_verbosity()
    try:
        return __main__.main(["--model", model, "--use_cpu", "--output", str(folder), *options])
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        datasets.enable_progress_bars()


def run(folder, model, *options):
    assert command(folder, model, *options) == 0
    with (folder / "weight_quality.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(model_folder, other_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, model_folder, "--reference", other_model_folder, "--languages", "en", "--pairs", "12")


@pytest.mark.lengthy
def test_rows_and_figure(finished):
    folder, rows = finished
    assert (folder / "weight_quality.png").stat().st_size > 1000
    both = [row for row in rows if (row["side"], row["kind"]) == ("both", "all")]
    keys = [(row["scheme"], row["layer"], row["score"]) for row in both]
    weights = [(name, str(layer), "weight") for name in scores.LAYERED for layer in (0, 1, 2)]
    weights += [(name, "", "weight") for name in ("uniform", "sampo", "ld", "d2po", "confpo")]
    baselines = [(name, "", "baseline") for name in ("surprisal", "reference_surprisal", "unmatched")]
    assert keys == [*weights, *baselines, *((name, layer, "contribution") for name, layer, _ in weights)]
    assert len(rows) == len(both) * 3 * 5
    for row in rows:
        if row["responses"] == "0":
            assert row["kind"] in ("language", "format") and row["auroc"] == row["low"] == row["high"] == ""
        else:
            assert 0 <= float(row["low"]) <= float(row["auroc"]) <= float(row["high"]) <= 1
        assert row["last"] == str(row["layer"] == "2")
    counted = {row["kind"]: int(row["responses"]) + int(row["left_out"]) for row in rows if row["side"] == "both"}
    assert counted.pop("all") == sum(counted.values()) == 24


def test_what_must_hold_whatever_the_model(finished):
    by_key = {(row["scheme"], row["side"]): float(row["auroc"]) for row in finished[1] if row["kind"] == "all"}
    uniform = [r for r in finished[1] if (r["scheme"], r["score"]) == ("uniform", "weight") and r["auroc"]]
    assert {row["auroc"] for row in uniform} == {"0.5"}
    assert all(by_key["unmatched", side] > 0.6 for side in ("chosen", "rejected"))


def found_by_hand() -> Found:
    """Four pairs that count and one that does not: each half has a setting of its own that is best there."""
    columns = [Column("contrast", 0, "weight"), Column("contrast-cosine", 1, "weight")]
    columns += [Column("unmatched", None, "baseline"), Column("contrast", 0, "contribution")]
    values = np.array(
        [
            [[0.9, 0.9], [np.nan, np.nan], [0.2, 0.4], [0.8, 0.8], [0.3, 0.3]],
            [[0.1, 0.1], [np.nan, np.nan], [0.6, 0.8], [0.2, 0.2], [0.7, 0.7]],
            [[0.5, 0.5], [np.nan, np.nan], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
            [[1.0, 1.0], [np.nan, np.nan], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
        ]
    )
    return Found(columns, values, ["price"] * 5, 2)


def test_what_one_half_chooses_is_reported_on_the_other():
    found = found_by_hand()
    first, second = halves_of(found)
    assert first.tolist() == [True, False, False, True, False]
    assert second.tolist() == [False, False, True, False, True]
    rows = choices(found, "policy", None)
    assert [(row["family"], row["reported_on"]) for row in rows] == [
        (name, half) for name in ("contrast", "unmatched") for half in ("first", "second")
    ]
    # The second half likes the cosine (0.7), which is worst on the first (0.15), and the other way round.
    assert (rows[0]["scheme"], rows[0]["layer"], rows[0]["where_chosen"]) == ("contrast-cosine", 1, 0.7)
    assert rows[0]["auroc"] == pytest.approx(0.15) and rows[0]["over_diff"] == pytest.approx(-0.35)
    assert (rows[1]["scheme"], rows[1]["layer"], rows[1]["where_chosen"]) == ("contrast", 0, 0.85)
    assert rows[1]["auroc"] == pytest.approx(0.3) and rows[1]["over_diff_low"] <= -0.2 <= rows[1]["over_diff_high"]
    assert rows[2]["auroc"] == 0.5 and rows[2]["over_diff"] == 0 and rows[2]["chosen_among"] == 1


def test_one_setting_for_all_models(tmp_path, capsys):
    found = found_by_hand()
    across.save_found(found, tmp_path, "policy", None)
    kept = across.read_found(tmp_path)
    assert (kept.found.columns, kept.found.kinds, kept.found.last) == (found.columns, found.kinds, found.last)
    np.testing.assert_array_equal(kept.found.auroc, found.auroc)
    rows = across.across([kept, kept._replace(model="other")], "contrast")
    assert [row["model"] for row in rows] == ["policy", "other"] * 2
    # As in the halves of one model, each half chooses what is worst on the other.
    assert [row["scheme"] for row in rows] == ["contrast-cosine"] * 2 + ["contrast"] * 2
    assert rows[0]["auroc"] == pytest.approx(0.15) and rows[0]["over_diff"] == pytest.approx(-0.35)
    assert rows[2]["auroc"] == pytest.approx(0.3) and rows[2]["diff"] == 0.5
    assert across.main([str(tmp_path), str(tmp_path), "--output", str(tmp_path / "all")]) == 0
    assert "| policy | first | contrast-cosine, layer" in (tmp_path / "all" / "across.md").read_text()
    assert across.main([str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "has no auroc.npz" in capsys.readouterr().out.replace("\n", " ")


def test_names_of_layers():
    places = across.places_of(30)
    assert (places["-1"], places["0"], places["-31"], places["80% of the depth"]) == (30, 0, 0, 24)
    assert across.places_of(2)["50% of the depth"] == 1


def test_one_pair_has_no_other_half():
    found = found_by_hand()
    alone = Found(found.columns, found.auroc[:, :2], ["price"] * 2, 2)
    assert choices(alone, "policy", "reference") == []


@pytest.mark.lengthy
def test_contrast_turns_over_the_weights_of_its_plan(finished):
    """One less the weight ranks tokens the other way round; where both are clipped they tie, at most."""
    folder, rows = finished
    found = {(row["scheme"], row["layer"]): row for row in rows if (row["side"], row["kind"]) == ("both", "all")}
    for name, plan in CONTRAST.items():
        for layer in ("0", "1", "2"):
            got, moved = (float(found[scheme, layer]["auroc"]) for scheme in (name, plan))
            assert abs(got - (1 - moved)) < 0.2
    assert (folder / "halves.csv").stat().st_size > 100
    assert "| family | half | chosen |" in (folder / "summary.md").read_text()


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("scheme", "options"),
    [("otpo-reg0.02", {"ot_reg": 0.02}), *((name, {"weighting": name}) for name in PRODUCTS)],
)
def test_weights_and_contributions_are_the_trainers(scheme, options, model_folder, other_model_folder, tmp_path):
    """Weights, contributions to the reward, and how well they find the spans."""
    from transformers import AutoModelForCausalLM

    pairs = __main__.load_pairs(["en", "th"], 8)
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", **options}
    args = OTPOConfig(str(tmp_path), hidden_layer=1, max_length=None, **options)
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder, dtype=torch.float32)
    rows = pairs.select_columns(["prompt", "chosen", "rejected"])
    trainer = OTPOTrainer(model_folder, reference, args, train_dataset=rows)
    scorer = Scorer(pairs, model_folder, other_model_folder, dtype=torch.float32, use_cpu=True)
    found = scorer.find([scheme], [1], batch=3)
    assert [column.score for column in found.columns] == ["weight", "contribution"]
    for place, pair in enumerate(explain_rows(trainer, range(len(pairs)))):
        for number, (side, sign) in enumerate(((pair.chosen, 1), (pair.rejected, -1))):
            labels = scorer.labels[place][number]
            own = np.stack([side.weights, sign * side.contributions(weighted=True) / args.beta])
            _, made = scorer._scores([place], [scheme], [1])
            np.testing.assert_allclose(made[:, number, : own.shape[1]], own, rtol=1e-3, atol=1e-5)
            if scheme == "otpo-reg0.02":  # with the others too many tokens weigh the same up to rounding
                want = auroc(own, labels.in_span) if labels.searchable else [np.nan] * 2
                np.testing.assert_allclose(found.auroc[:, place, number], want, atol=0.01)


def test_compass_by_chosen_layers_and_schemes(compass_folder, tmp_path):
    options = ["--languages", "en", "--pairs", "6", "--layers", "-1", "0", "--schemes", "otpo-cosine", "unmatched"]
    rows = run(tmp_path, compass_folder, *options)
    assert {(row["scheme"], row["layer"]) for row in rows} == {
        ("otpo-cosine", "0"),
        ("otpo-cosine", "2"),
        ("unmatched", ""),
    }
    assert {row["score"] for row in rows} == {"weight", "baseline"}


def test_layers_by_name():
    assert resolve_layers(["all"], 2) == [0, 1, 2]
    assert resolve_layers(["last"], 2) == [2]
    assert resolve_layers(["-1", "0", "2"], 2) == [0, 2]
    for wrong in (["3"], ["-4"], ["first"], ["all", "0"]):
        with pytest.raises(
            ValueError, match=rf"`--layers {' '.join(wrong)}`: give 'all', 'last', or numbers within \["
        ):
            resolve_layers(wrong, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "0"], "`--pairs` must be at least 1, got 0."),
        (["--batch", "0"], "`--batch` must be at least 1, got 0."),
        (["--schemes", "otop"], "`--schemes` has ['otop'], and there are"),
        (["--dtype", "int8"], "`--dtype` must be one of ['float32', 'bfloat16'], got 'int8'."),
        (["--languages", "xx"], "`languages` must be among ['en', "),
        (["--model", "nowhere"], "`--model nowhere` can't be loaded: "),
        (["--reference", "nowhere"], "`--reference nowhere` can't be loaded: "),
        (["--pairs", "2", "--layers", "7"], "`--layers 7`: give 'all', 'last', or numbers within [-3, 2]"),
    ],
)
def test_what_is_refused(options, message, model_folder, tmp_path, capsys):
    assert command(tmp_path / "out", model_folder, *options) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_pairs_beyond_the_bundled_are_drawn():
    assert len(__main__.load_pairs(["en"], None)) == len(load_demo_preferences("test", ["en"]))
    assert len(__main__.load_pairs(["en"], 40)) == 40
    assert len(SCHEMES) == len(set(SCHEMES)) == 28
