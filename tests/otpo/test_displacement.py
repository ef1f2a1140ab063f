"""Whether chosen answers became less likely: the numbers by hand, and the line at the end of a run, both ways."""

import json

import pytest
from cli_helpers import arguments
from helpers import make_pairs

from otpo.cli import align
from otpo.training.displacement import NOTABLE, find_fall


def log(unweighted, weighted=None, logps=-20.0, **more):
    rewards = {"rewards/chosen_unweighted": unweighted, "rewards/chosen": unweighted if weighted is None else weighted}
    return {**rewards, "logps/chosen": logps, **more}


def test_a_fall_is_a_mean_of_the_last_quarter():
    logs = [log(9.0), log(0.0), log(-1.0, -0.5, -30.0, **{"pairs/similarity": -0.25}), log(-3.0, -1.5, -40.0)]
    (last,) = [find_fall([*logs, {"train_loss": 1.0}, {"eval_rewards/chosen": 5.0}], beta=0.5)]
    assert last == (6.0, -37.0, -40.0, None, 1)
    found = find_fall([*logs, *logs], beta=0.5)
    assert found == ((1.0 + 3.0) / 2 / 0.5, -35.0 + 2.0, -35.0, -0.25, 2)
    text = found.describe()
    assert text.startswith("logps/chosen fell from -33 to -35: 4 nats an answer, by the last 2 log(s)")
    assert "(pairs/similarity -0.25)" in text and "`loss_type`" in text and "`weighting=contrast`" in text
    assert "(pairs/similarity" not in last.describe()


def test_weights_may_hide_a_fall():
    found = find_fall([log(-1.0, 0.5)], beta=0.5)
    assert found is not None and found.nats == 2.0 and found.before < found.after
    assert found.describe().startswith("chosen answers fell, though logps/chosen, which weighs their tokens, did not")


@pytest.mark.parametrize(
    "logs",
    [
        [],
        [{"loss": 1.0}],
        [log(-9.0), log(1.0), log(0.5), log(0.25)],  # it rose in the end
        [log(-0.5 * NOTABLE * 0.1)],
        [log(float("nan"))],
    ],
    ids=["nothing", "other logs", "rises", "hardly", "not a number"],
)
def test_no_fall(logs):
    assert find_fall(logs, beta=0.1) is None


def test_without_a_beta_nothing_tells():
    assert find_fall([log(-1.0)], beta=0.0) is None


@pytest.mark.parametrize(
    ("changes", "falls"),
    [({"loss_type": "sigmoid"}, True), ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 5.0]}, False)],
    ids=["falls", "rises"],
)
def test_a_run_ends_with_a_line_where_they_fell(model_folder, tmp_path, capsys, changes, falls):
    """Rejected answers that begin as the chosen ones: what lowers them lowers the chosen ones."""
    rows = make_pairs(12).to_list()
    for row in rows:
        text = row["chosen"][0]["content"]
        row["chosen"][0]["content"], row["rejected"][0]["content"] = f"{text} to", f"{text} to to"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_steps": 12, "per_device_train_batch_size": 6, "weighting": "uniform", "beta": 1.0, **changes}
    argv = arguments(model_folder, str(tmp_path / "pairs.jsonl"), tmp_path / "out", **options)
    assert align.main([*argv, "--report", str(tmp_path / "report.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chosen ")]
    told = json.loads((tmp_path / "report.json").read_text())["chosen_fell"]
    assert len(lines) == falls == (told is not None)
    if falls:
        assert "fell from" in lines[0] and "(pairs/similarity" in lines[0] and told["nats"] >= NOTABLE
