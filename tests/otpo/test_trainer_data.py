"""Datasets and pairs that `OTPOTrainer` refuses, and pairs that it drops and counts."""

import math
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from helpers import (
    LONG,
    make_pairs,
    make_plain_pairs,
    make_trainer,
    options,
    train_and_evaluate,
)
from weighting_helpers import with_weights

from otpo import OTPOTrainer
from otpo.data.preferences import RowError


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("split", "name"),
    [("train", "train"), ("eval", "eval"), ("several", "second")],
)
def test_missing_columns_are_named(split, name, stream, model_folder, tmp_path):
    broken: Any = make_pairs().rename_columns({"chosen": "good", "rejected": "bad"})
    broken = broken.to_iterable_dataset() if stream else broken
    data = {
        "train": {"train_dataset": broken},
        "eval": {"train_dataset": make_pairs(), "eval_dataset": broken},
        "several": {"train_dataset": make_pairs(), "eval_dataset": {"first": make_pairs(), "second": broken}},
    }[split]
    message = (
        rf"The {name} dataset lacks the column\(s\) \['chosen', 'rejected'\]; it has \['bad', 'good', 'prompt'\]"
        r".*dataset.rename_column\(old, new\)"
    )
    with pytest.raises(ValueError, match=message):
        OTPOTrainer(model_folder, args=options(tmp_path), **data)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_datasets_without_rows(stream, model_folder, tmp_path):
    empty = IterableDataset.from_generator(lambda: iter(())) if stream else make_pairs().select([])
    with pytest.raises(ValueError, match="train dataset has no rows"):
        make_trainer(model_folder, tmp_path, empty)


def test_no_dataset(model_folder, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make_trainer(model_folder, tmp_path, None)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_lists_are_no_datasets(split, model_folder, tmp_path):
    data: Any = {"train_dataset": make_pairs(), "eval_dataset": make_pairs(4)}
    data[f"{split}_dataset"] = data[f"{split}_dataset"].to_list()
    with pytest.raises(TypeError, match=rf"{split}.* must be a `Dataset` or `IterableDataset`, got `list`.*from_list"):
        OTPOTrainer(model_folder, args=options(tmp_path), **data)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_a_dictionary_of_splits(stream, model_folder, tmp_path):
    data: Any = {"train": make_pairs(), "test": make_pairs(4)}
    data = IterableDatasetDict({k: v.to_iterable_dataset() for k, v in data.items()}) if stream else DatasetDict(data)
    with pytest.raises(TypeError, match=r"`Dataset` or `IterableDataset`, got `\w*DatasetDict`.*dataset\['test'\]"):
        make_trainer(model_folder, tmp_path, data)
    OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), eval_dataset=data).evaluate()


# Pairs that can't be trained on


def pairs_of_which_some_are_empty() -> Dataset:
    """Rows 1 and 4 have a prompt that fills forty tokens; row 6 has no prompt and a completion of one token."""
    rows = [(f"cotton {i} ", "yes it ships", "no") for i in range(8)]
    rows[1] = rows[4] = (LONG, "yes", "no")
    rows[6] = ("", "", "no red box")
    return make_plain_pairs(rows)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_empty_completions_are_dropped_and_counted(stream, mode, model_folder, tmp_path):
    data: Any = pairs_of_which_some_are_empty()
    trainer = make_trainer(
        model_folder,
        tmp_path,
        data.to_iterable_dataset() if stream else data,
        max_length=40,
        truncation_mode=mode,
        per_device_train_batch_size=1,
        max_steps=5 if mode == "keep_start" else 7,
    )
    run = train_and_evaluate(trainer)
    assert len(run.losses) == trainer.args.max_steps and all(math.isfinite(loss) for loss in run.losses)
    # The end of a sequence keeps the completion however long the prompt is.
    want = {"empty": 3 if mode == "keep_start" else 1}
    assert dict(trainer.dropped_pairs["train"]) == want
    kept = [row["prompt"] for row in trainer.train_dataset]
    assert [f"cotton {i} " in kept for i in range(8)] == [i not in (1, 4, 6) for i in range(8)]


def test_dropped_pairs_by_dataset(model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, max_length=40),
        train_dataset=make_plain_pairs([("a", "b", "c")]),
        eval_dataset={"some": pairs_of_which_some_are_empty(), "none": make_plain_pairs([("a", "b", "c")])},
    )
    counts = {name: dict(dropped) for name, dropped in trainer.dropped_pairs.items()}
    assert counts == {"train": {}, "some": {"empty": 3}, "none": {}}
    assert len(trainer.eval_dataset["some"]) == 5


IDENTICAL: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "outright": ({}, ("a box", " of cotton", " of cotton")),
    "both_only_the_end": ({}, ("a box", "", "")),
    "after_truncation": ({"max_length": 20}, ("a box", " red" * 30 + " yes", " red" * 30 + " no")),
    "after_truncation-keep_end": (
        {"max_length": 20, "truncation_mode": "keep_end"},
        ("a box", " yes" + " red" * 30, " no" + " red" * 30),
    ),
    "after_the_first_token_without_prompt": ({}, ("", "a", "b")),
}


def pairs_with_identical_rows(case: str) -> Dataset:
    """Row 0 is empty within twenty tokens, rows 3 and 5 are identical."""
    rows = [(f"cotton {i}", " yes", " no") for i in range(7)]
    rows[0] = (LONG, "yes", "no")
    rows[3] = rows[5] = IDENTICAL[case][1]
    return make_plain_pairs(rows)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("case", IDENTICAL)
def test_identical_pairs_are_refused_by_row(case, stream, model_folder, tmp_path):
    data: Any = pairs_with_identical_rows(case)
    settings = IDENTICAL[case][0]
    limit = rf" within max_length={settings.get('max_length', 128)},"
    with pytest.raises(ValueError, match=rf"Row 3 of the train dataset.*{limit}.*`drop_identical_pairs=True`"):
        data = data.to_iterable_dataset() if stream else data
        make_trainer(model_folder, tmp_path, data, drop_identical_pairs=False, **settings).train()


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("case", IDENTICAL)
def test_identical_pairs_are_dropped_on_demand(case, stream, model_folder, tmp_path):
    data: Any = pairs_with_identical_rows(case)
    settings = {"max_length": 20, **IDENTICAL[case][0], "drop_identical_pairs": True}
    kept = 4 if settings.get("truncation_mode") != "keep_end" else 5
    trainer = make_trainer(
        model_folder,
        tmp_path,
        data.to_iterable_dataset() if stream else data,
        **settings,
        per_device_train_batch_size=1,
        max_steps=kept,
    )
    trainer.train()
    assert trainer.dropped_pairs["train"]["identical"] == 2
    assert sum(1 for _ in trainer.train_dataset) == kept


def test_identical_pairs_of_the_evaluation_dataset(model_folder, tmp_path):
    with pytest.raises(ValueError, match="Row 3 of the second dataset"):
        OTPOTrainer(
            model_folder,
            args=options(tmp_path),
            train_dataset=make_pairs(),
            eval_dataset={"first": make_pairs(), "second": pairs_with_identical_rows("outright")},
        )


def test_no_pair_is_left(model_folder, tmp_path):
    data = make_plain_pairs([(LONG, "yes", "no")] * 3)
    with pytest.raises(ValueError, match=r"No pair of the train dataset is left: .*'empty': 3.* of 3.*max_length=20"):
        make_trainer(model_folder, tmp_path, data, max_length=20)


def test_no_pair_of_a_stream_is_left(model_folder, tmp_path):
    """It shows only when the stream is read; a training of no step must not look like one that went well."""
    data = make_plain_pairs([(LONG, "yes", "no")] * 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="No pair of the train dataset is left"):
        make_trainer(model_folder, tmp_path, data, max_length=20).train()


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_format_of_the_rows_makes_no_difference(form, stream, model_folder, tmp_path):
    """Lists of tokens that were tensors would be added up, not joined."""
    losses = []
    for pairs in (with_weights(make_pairs(8)), with_weights(make_pairs(8)).with_format(form)):
        data: Any = pairs.to_iterable_dataset() if stream else pairs
        losses.append(train_and_evaluate(make_trainer(model_folder, tmp_path, data, weighting="columns")).losses)
    assert losses[0] == losses[1]


def test_a_transform_of_the_rows_is_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"train dataset has a transform .* Apply it with `map`"):
        make_trainer(model_folder, tmp_path, make_pairs(8).with_transform(lambda rows: rows))


def test_a_row_that_can_not_be_tokenized_is_named(model_folder, tmp_path):
    pairs = make_pairs(6).to_list()
    pairs[3]["rejected"] = None
    with pytest.raises(RowError, match="Row 3 of the train dataset has no 'rejected': it is null or absent"):
        make_trainer(model_folder, tmp_path, Dataset.from_list(pairs))
    plain = make_plain_pairs([("a", " b", " c"), ("a", " b", "")]).to_list()
    plain[1]["chosen"] = None
    with pytest.raises(RowError, match="Row 1 of the eval dataset has no 'chosen'"):
        OTPOTrainer(
            model_folder, None, options(tmp_path), train_dataset=make_pairs(), eval_dataset=Dataset.from_list(plain)
        )


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_identical_pairs_alone_are_not_blamed_on_the_length(stream, model_folder, tmp_path):
    pairs = make_plain_pairs([("", "a", "b"), ("x", " y", " y")])
    data: Any = pairs.to_iterable_dataset() if stream else pairs
    with pytest.raises(
        ValueError, match=r"left: \{'identical': \d+\} .* Give pairs whose completions differ"
    ) as found:
        make_trainer(model_folder, tmp_path, data, drop_identical_pairs=True).train()
    assert "Raise" not in str(found.value)
    with pytest.raises(RowError, match=r"Row 0 .* \(The first token of a row without a prompt"):
        make_trainer(model_folder, tmp_path, data, drop_identical_pairs=False).train()
