"""A small matrix from end to end: its table comes out the same however often it stops, and failures stay in cells."""

import csv
import json

import datasets
import numpy as np
import pytest
from helpers import make_pairs
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from benchmarks.ablation import __main__, run, start
from benchmarks.ablation.cells import NAMED, Matrix, read_matrix, weightings_of
from benchmarks.ablation.judges import checkers, judged, load_judge
from benchmarks.ablation.report import report, table_rows
from benchmarks.ablation.training import evaluate, held_out, start_model, training_pairs
from otpo import OTPOConfig
from otpo.data import load_demo_preferences

TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 0.01,
    "max_length": 700,
}
SMALL = {"weightings": ["dpo", "otpo-reg0.02"], "seeds": [0, 1], "pairs": 6, "prompts": 3, "answer_tokens": 6}
FIGURES = ("win_rate_length.png", "margins.png", "length_drift.png", "costs.png")
pytestmark = pytest.mark.usefixtures("own_process")


def matrix(**changes):
    values = {**SMALL, **changes}
    for name in ("seeds", "data"):
        values[name] = tuple(values.get(name, ("demo",)))
    return Matrix(**{**values, "weightings": weightings_of(values["weightings"]), "training": TRAINING})


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("matrix") / "small.yaml"
    path.write_text(json.dumps({**SMALL, "training": TRAINING}))  # JSON is YAML
    return str(path)


@pytest.fixture(scope="module")
def finished(small_file, model_folder, tmp_path_factory):
    """The folder of a run from the command line, uninterrupted."""
    verbosity = logging.get_verbosity()
    folder = tmp_path_factory.mktemp("finished")
    command = ["--matrix", small_file, "--checkpoint", model_folder, "--output", str(folder)]
    try:
        assert __main__.main(command) == 0
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
    return folder


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}


def without_costs(record):
    training = {name: value for name, value in record["training"].items() if name not in ("step_seconds", "peak_mib")}
    return {**record, "training": training}


@pytest.mark.lengthy
def test_table_and_figures(finished):
    with (finished / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["weighting"], row["seeds"], row["failed"]) for row in rows] == [
        ("dpo", "2", "0"),
        ("otpo-reg0.02", "2", "0"),
    ]
    compared = rows[1]
    assert float(compared["margin_low"]) <= float(compared["margin"]) - float(rows[0]["margin"])
    assert float(compared["margin_high"]) >= float(compared["margin"]) - float(rows[0]["margin"])
    assert all((finished / name).stat().st_size > 1000 for name in FIGURES)
    with (finished / "start.csv").open() as file:
        start = list(csv.DictReader(file))
    assert [(row["held_out"], row["prompts"]) for row in start] == [("test", "3"), ("test_templates", "3")]
    assert all(0 <= float(row["preferred"]) <= 100 and 0 <= float(row["right"]) <= 100 for row in start)
    with (finished / "costs.csv").open() as file:
        assert all(float(row["ms_per_step"]) > 0 and float(row["peak_mib"]) > 0 for row in csv.DictReader(file))


def test_cells_of_a_seed_share_batches_and_start(finished):
    cells = records(finished)
    orders = {name: cell["training"]["order"] for name, cell in cells.items()}
    assert orders["dpo__demo__seed0"] == orders["otpo-reg0.02__demo__seed0"]
    assert orders["dpo__demo__seed0"] != orders["dpo__demo__seed1"]
    assert all(cell["training"]["margins"][0] == 0 and cell["training"]["steps"] == 2 for cell in cells.values())
    assert cells["dpo__demo__seed0"]["held_out"] != cells["otpo-reg0.02__demo__seed0"]["held_out"]


@pytest.mark.lengthy
def test_killed_matrix_goes_on_and_agrees(finished, model_folder, tmp_path, monkeypatch):
    trained = []

    def killed_at_the_third(cell, *args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(cell.name)
        return train(cell, *args)

    train = run.train
    monkeypatch.setattr(run, "train", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run.run_matrix(matrix(), model_folder, tmp_path, checkers)
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    monkeypatch.setattr(run, "train", train)
    results = run.run_matrix(matrix(), model_folder, tmp_path, checkers)
    report(matrix(), results, tmp_path, __main__.Console(quiet=True))
    assert len(before) == 2
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "table.csv").read_bytes() == (finished / "table.csv").read_bytes()
    ours, theirs = records(tmp_path), records(finished)
    assert {n: without_costs(r) for n, r in ours.items()} == {n: without_costs(r) for n, r in theirs.items()}


@pytest.mark.lengthy
def test_parts_make_the_whole(finished, small_file, model_folder, tmp_path):
    command = ["--matrix", small_file, "--checkpoint", model_folder, "--output", str(tmp_path)]
    assert __main__.main([*command, "--part", "2/2"]) == 0
    assert set(records(tmp_path)) == {"otpo-reg0.02__demo__seed0", "otpo-reg0.02__demo__seed1"}
    assert not (tmp_path / "table.csv").exists()
    assert __main__.main([*command, "--only-report"]) == 0
    with (tmp_path / "table.csv").open() as file:
        assert [(row["seeds"], row["failed"]) for row in csv.DictReader(file)] == [("0", "0"), ("2", "0")]
    assert "| dpo | 0 | not run | not run |" in (tmp_path / "table.md").read_text()
    assert __main__.main([*command, "--part", "1/2", "--keep-models"]) == 0
    assert __main__.main(command) == 0
    assert (tmp_path / "table.csv").read_bytes() == (finished / "table.csv").read_bytes()
    assert not (tmp_path / "costs.csv").exists()  # none of them was alone
    kept = start_model(tmp_path / "models" / "dpo__demo__seed1")
    rows = held_out(matrix())
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert evaluate(kept.eval(), tokenizer, rows, matrix()) == records(tmp_path)["dpo__demo__seed1"]["held_out"]


@pytest.mark.lengthy
def test_rivals_are_cells_like_others(model_folder, tmp_path):
    rivals = matrix(weightings=["dpo", "tdpo2", "tis", "d2po", "otpo-cosine"], seeds=[0])
    results = run.run_matrix(rivals, model_folder, tmp_path, checkers)
    assert not results.failed
    assert len({record["training"]["order"] for record in results.cells.values()}) == 1
    margins = {tuple(record["held_out"]["test"]["chosen"]) for record in results.cells.values()}
    assert len(margins) == 5


@pytest.mark.lengthy
def test_held_out_files_and_reward_models(model_folder, tmp_path):
    pairs, judge_folder = tmp_path / "pairs.jsonl", tmp_path / "reward"
    make_pairs(5).to_json(pairs)
    config = AutoConfig.from_pretrained(model_folder, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(judge_folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(judge_folder)
    judge = load_judge(f"reward:{judge_folder}")
    files = matrix(weightings=["dpo", "budget"], seeds=[0], held_out=(str(pairs),), data=[str(pairs)])
    results = run.run_matrix(files, model_folder, tmp_path / "out", judge, "reward")
    assert not results.failed
    row = table_rows(files, results)[1]
    assert row["right"] == row["preferred_new_wordings"] == row["right_low"] == ""
    assert 0 <= row["win_rate"] <= 100 and 0 <= row["preferred"] <= 100
    report(files, results, tmp_path, __main__.Console(quiet=True))
    again = run.run_matrix(files, model_folder, tmp_path / "out", None, "none")
    assert [row["win_rate"] for row in table_rows(files, again)] == ["", ""]
    report(files, again, tmp_path, __main__.Console(quiet=True))
    failing = run.run_matrix(files, model_folder, tmp_path / "out", checkers, "checkers")
    assert all("'checkers' knows the bundled pairs alone" in why for why in failing.failed.values())
    for folder, message in ((tmp_path, "no reward model in"), (model_folder, "2 labels, a reward model has one")):
        with pytest.raises(ValueError, match=message):
            load_judge(f"reward:{folder}")
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(ValueError, match=r"row 0 of .*pairs\.jsonl needs `prompt`, `chosen` and `rejected` as lists"):
        held_out(files)


def test_more_prompts_than_are_bundled_are_drawn():
    rows = held_out(matrix(prompts=300, held_out=("test",)))["test"]
    assert len({row["product_id"] for row in rows}) > 40 and len(rows) == 300


@pytest.mark.lengthy
def test_failing_judges_cost_their_cells_alone(model_folder, tmp_path, monkeypatch):
    asked = []

    def sometimes(prompts, answers_a, answers_b, rows):
        asked.append(1)
        if len(asked) == 1:
            raise TimeoutError("no answer")
        return [np.nan] * len(prompts) if len(asked) == 2 else [1.0] * len(prompts)

    wide = matrix(weightings=["dpo", "length", "budget"], seeds=[0])
    results = run.run_matrix(wide, model_folder, tmp_path, sometimes, "mine")
    assert {cell.weighting: why for cell, why in results.failed.items()} == {
        "dpo": "judge: the judge raised TimeoutError: no answer",
        "length": "judge: the judge gave nan for prompt 0 (3 in all), not within [0, 1]",
    }
    rows = table_rows(wide, results)
    assert [(row["weighting"], row["failed"], row["win_rate"]) for row in rows] == [
        ("dpo", 1, ""),
        ("length", 1, ""),
        ("budget", 0, 100.0),
    ]
    report(wide, results, tmp_path, __main__.Console(quiet=True))
    answers = {name: record["held_out"] for name, record in records(tmp_path).items()}
    monkeypatch.setattr(run, "train", lambda *args: pytest.fail("trained again"))
    again = run.run_matrix(wide, model_folder, tmp_path, sometimes, "mine")
    assert not again.failed
    assert {name: record["held_out"] for name, record in records(tmp_path).items()} == answers


def test_failing_training_costs_its_cell_alone(model_folder, tmp_path):
    own = {"bad": {"weighting": "otpo", "ot_reg": -1.0}, "good": {"weighting": "budget"}}
    bad = matrix(weightings=own, seeds=[0])
    results = run.run_matrix(bad, model_folder, tmp_path, checkers)
    ((cell, why),) = results.failed.items()
    assert cell.weighting == "bad"
    assert "`ot_reg` must" in why
    assert [row["seeds"] for row in table_rows(bad, results)] == [0, 1]


def test_pair_with_an_empty_side(model_folder, tmp_path):
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), row, strict=True))
        for row in [
            ("a box", "red", "blue"),
            ("a shirt", "", "blue"),
            ("today", "cotton", ""),
            ("ten", "twenty", "small"),
        ]
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    results = run.run_matrix(
        matrix(weightings=["dpo", "otpo"], seeds=[0], data=[str(path)], pairs=None), model_folder, tmp_path, checkers
    )
    assert not results.failed
    margins = [record["training"]["margins"] for record in results.cells.values()]
    assert np.isfinite(margins).all()


def test_other_options_do_not_overwrite(finished, model_folder):
    with pytest.raises(ValueError, match="made with other options, data or checkpoint"):
        run.run_matrix(matrix(prompts=2), model_folder, finished, checkers)
    with pytest.raises(FileNotFoundError, match="no SFT checkpoint"):
        run.run_matrix(matrix(), finished, finished, checkers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weightings", "dpo", "best"], "Unknown weightings ['best']. There are ['budget', 'c"),
        (["--weightings"], "The matrix has no cells: `weightings` is empty"),
        (["--seeds"], "The matrix has no cells: `seeds` is empty"),
        (["--data"], "The matrix has no cells: `data` is empty"),
        (["--data", "nowhere.jsonl"], "or a JSONL file of pairs, got 'nowhere.jsonl'"),
        (["--seeds", "1", "1"], "names something twice"),
        (["--judge", "json:nothing"], "has no attribute 'nothing'"),
        (["--judge", "reward:nowhere"], "there is no reward model in nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused(small_file, arguments, message, capsys):
    assert __main__.main(["--matrix", small_file, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_matrix_files(tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text("weightings: {mine: {weighting: otpo, ot_reg: 0.5}, dpo: }\nseeds: [3]\n")
    read = read_matrix(path)
    assert [(cell.weighting, cell.seed, cell.options.get("ot_reg")) for cell in read.cells] == [
        ("mine", 3, 0.5),
        ("dpo", 3, None),
    ]
    assert read.baseline == "dpo"
    for text, message in (
        ("weightings: [dpo]\nfoo: 1", r"has the keys \['foo'\]"),
        ("weightings: {a: {weighting: otpo, reg: 1}}", r"'a' sets \['reg'\], which `OTPOConfig` does not have"),
        ("weightings: {a: {weighting: tdpo9}}", "needs `weighting` among"),
        ("weightings: {a: {weighting: otpo, method: ppo}}", r"'a' has the `method` 'ppo'. There are \['otpo', "),
        ("weightings: [dpo]\nheld_out: [validation]", r"`held_out` must be among \['test', 'test_templates'\] or a"),
        ("weightings: {a: {weighting: otpo, seed: 1}}", r"'a' sets \['seed'\], which cells share"),
        ("weightings: [dpo]\ntraining: {seed: 1}", r"'training' sets \['seed'\]"),
        ("- dpo", "must hold a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_matrix(path)


def test_data_by_name(tmp_path):
    longer = training_pairs("demo-longer", matrix(data=["demo-longer"], pairs=40), seed=0)
    assert len(longer) == 40
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in longer)
    price = training_pairs("demo-price", matrix(pairs=None), seed=0)
    assert list(price["chosen"]) == list(load_demo_preferences("train", ("en",), ("price",))["chosen"])
    path = tmp_path / "demo-of-mine.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert training_pairs(str(path), matrix(data=[str(path)]), seed=0)[0]["chosen"] == "b"


@pytest.mark.parametrize("name", NAMED)
def test_named_weightings_are_options(name, tmp_path):
    named = {option: value for option, value in NAMED[name].items() if option != "method"}
    OTPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **named)


def test_checkers_know_right_from_wrong():
    rows = list(load_demo_preferences("test", ("en", "id")))
    prompts = [row["prompt"][0]["content"] for row in rows]
    chosen, rejected = ([row[side][0]["content"] for row in rows] for side in ("chosen", "rejected"))
    assert judged(checkers, prompts, chosen, rejected, rows) == [1.0] * len(rows)
    assert judged(checkers, prompts, [""] * len(rows), chosen, rows) == [0.0] * len(rows)
    assert judged(checkers, prompts, chosen, chosen, rows) == [0.5] * len(rows)


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_the_start_asks_for_data_that_the_demo_makes(tmp_path, monkeypatch, scale):
    ran = {}
    monkeypatch.setattr(start, "run", lambda step, options: ran.update({step: options}))
    monkeypatch.setattr(start, "DOCUMENTS", dict.fromkeys(start.DOCUMENTS, 60))
    start.make_start(tmp_path, ("en",), (1, 1), scale)
    assert list(ran) == ["pretrain", "sft"]
    for step, option in (
        ("pretrain", "dataset_name"),
        ("sft", "dataset_name"),
        ("pretrain", "tokenizer_name_or_path"),
    ):
        assert ran[step][option].exists()
