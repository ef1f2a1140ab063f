"""Messages number rows as the dataset does that the user named, also where a command takes some of them, shuffled."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import arguments, refusal
from datasets import Dataset
from helpers import make_pairs
from trl import DatasetMixtureConfig

from otpo.cli import align, explain
from otpo.data.loading import RowArguments, load_rows
from otpo.data.row_numbers import numbers_of, remember_numbers

pytestmark = pytest.mark.usefixtures("own_process")
BAD = 17


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Thirty pairs with weights; in one file the weights of one are of no use, in the other it prefers nothing."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [{**row, "chosen_weights": [], "rejected_weights": []} for row in make_pairs(30)]
    for name, change in (
        ("weights", {"chosen_weights": [[0, 1, -1.0]]}),
        ("same", {"rejected": pairs[BAD]["chosen"]}),
    ):
        changed = [*pairs[:BAD], {**pairs[BAD], **change}, *pairs[BAD + 1 :]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    return folder


def line(model, file, output, **changes):
    return arguments(model, str(file), output, **{"eval_strategy": "no", "do_eval": False, **changes})


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_of_a_shuffle_keep_their_numbers(model_folder, rows, tmp_path, capsys, seed):
    order = np.random.default_rng(seed).permutation(30)
    count = 1 + int(np.flatnonzero(order == BAD)[0])  # so that the row is the last one
    assert count - 1 != BAD
    changes = {"seed": seed, "max_train_rows": count}
    message = refusal(
        align.main, capsys, line(model_folder, rows / "weights.jsonl", tmp_path, weighting="columns", **changes)
    )
    assert f"Row {BAD} of the train dataset has the weight -1.0" in " ".join(message.split())
    message = refusal(align.main, capsys, line(model_folder, rows / "same.jsonl", tmp_path, **changes))
    assert f"Row {BAD} of the train dataset has the same chosen and rejected" in " ".join(message.split())


@pytest.mark.parametrize("count", [None, 20])
def test_rows_of_a_cut_keep_their_numbers(rows, count):
    source = RowArguments(dataset_name=str(rows / "same.jsonl"), max_train_rows=count, max_eval_rows=3)
    cut = DatasetMixtureConfig(test_split_size=6)
    whole = load_rows(source, DatasetMixtureConfig(), (None, None), seed=3, evaluate=False)[0]
    parts = load_rows(source, cut, seed=3, evaluate=True)
    numbers = [numbers_of(part).tolist() for part in parts]
    assert [len(each) for each in numbers] == [count or 24, 3] and len({*numbers[0], *numbers[1]}) == sum(
        map(len, numbers)
    )
    for part, own in zip(parts, numbers, strict=True):
        assert [whole[number]["chosen"] for number in own] == part["chosen"]


def test_rows_that_are_explained_keep_their_numbers(model_folder, rows, tmp_path, capsys):
    words = ["--model_name_or_path", model_folder, "--dataset_name", str(rows / "weights.jsonl"), "--use_cpu"]
    words += ["--rows", "2", str(BAD), "--weighting", "columns", "--output", str(tmp_path / "page.html")]
    assert f"Row {BAD} of the train dataset has the weight -1.0" in " ".join(
        refusal(explain.main, capsys, words).split()
    )


def test_numbers_are_of_one_dataset_alone():
    data = Dataset.from_dict({"a": [1, 2, 3]})
    assert numbers_of(data) is None
    some = remember_numbers(data.select([2, 0]), [2, 0])
    assert numbers_of(some).tolist() == [2, 0] and numbers_of(some.select([1])) is None
