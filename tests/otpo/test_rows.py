"""Which row is which: datasets of one name, rows that were dropped, streams that are looked at while they train."""

import sys

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import Collected, make_pairs, make_plain_pairs, options, parameters, poison
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from otpo import LogTokenWeightsCallback, OTPOTrainer
from otpo.explain import explain_rows, find_row

ODD = "~"  # in no other text


def pairs_with_identical(rows: set[int], count: int = 10) -> Dataset:
    texts = [(f"cotton {i} costs", f" ten {i}", f" twenty {i}") for i in range(count)]
    return make_plain_pairs([(prompt, chosen, chosen) if i in rows else (prompt, chosen, rejected)
                             for i, (prompt, chosen, rejected) in enumerate(texts)])  # fmt: skip


def make(model, folder, train, evaluation=None, **changes) -> OTPOTrainer:
    args = options(folder, drop_identical_pairs=True, **changes)
    return OTPOTrainer(model, args=args, train_dataset=train, eval_dataset=evaluation)


# Datasets by themselves, not by their names


def test_an_evaluation_dataset_may_be_called_train(model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, pairs_with_identical({0, 2}), {"train": pairs_with_identical({1, 4, 5}, 8)})
    assert find_row(trainer, 1, "train")["prompt"] == "cotton 1 costs"
    assert find_row(trainer, 9)["prompt"] == "cotton 9 costs"
    assert find_row(trainer, 7, "eval_train")["prompt"] == "cotton 7 costs"
    with pytest.raises(ValueError, match="the eval_train dataset has no row 1 "):
        find_row(trainer, 1, "eval_train")
    assert {name: dict(counts) for name, counts in trainer.dropped_pairs.items()} == {
        "train": {"identical": 2},
        "eval_train": {"identical": 3},
    }
    assert trainer.evaluate().keys() >= {"eval_train_loss"}


def test_names_that_would_be_one_are_kept_apart(model_folder, tmp_path):
    sets = {"eval_train": pairs_with_identical({0}, 6), "train": pairs_with_identical({1, 2}, 8)}
    trainer = make(model_folder, tmp_path, make_pairs(), sets)
    assert {name: sum(counts.values()) for name, counts in trainer.dropped_pairs.items()} == {
        "train": 0,
        "eval_train": 1,
        "eval_eval_train": 2,
    }
    assert find_row(trainer, 7, "eval_eval_train")["prompt"] == "cotton 7 costs"


def test_evaluating_another_dataset_leaves_rows_alone(model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, make_pairs(), pairs_with_identical({0, 3}))
    before = find_row(trainer, 4, "eval")
    trainer.evaluate(pairs_with_identical({1, 2}, 6))
    assert find_row(trainer, 4, "eval") == before and before["prompt"] == "cotton 4 costs"
    assert dict(trainer.dropped_pairs["eval"]) == {"identical": 2}
    with pytest.raises(ValueError, match="has no row 3 "):
        find_row(trainer, 3, "eval")


@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_number_that_is_not_finite_is_of_the_dataset_that_is_read(where, model_folder, tmp_path, tokenizer):
    """Both datasets are called "train", and both have the odd pair, at other places."""
    odd = [("the box", f" a{ODD}box", " blue")]
    rows = [(f"cotton {i} costs", f" ten {i}", f" twenty {i}") for i in range(6)]
    data = {"train": make_plain_pairs([*rows, *odd]), "eval": make_plain_pairs([*rows[:2], *odd, *rows[2:]])}
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make(model, tmp_path, data["train"], {"train": data["eval"]}, per_device_train_batch_size=7)
    poison(model, tokenizer.convert_tokens_to_ids(ODD))
    run, place = (
        (trainer.train, "6 of the training") if where == "train" else (trainer.evaluate, "2 of the eval_train")
    )
    with pytest.raises(FloatingPointError, match=rf"row\(s\) {place} dataset"):
        run()


def test_alike_rows_are_all_named(model_folder, tmp_path, tokenizer):
    odd = ("the box", f" a{ODD}box", " blue")
    rows = [("cotton", " ten", " twenty"), odd, ("cotton", " red", " blue"), odd]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make(model, tmp_path, make_plain_pairs(rows))
    poison(model, tokenizer.convert_tokens_to_ids(ODD))
    with pytest.raises(FloatingPointError, match=r"row\(s\) 1 or 3, 1 or 3 of the training dataset"):
        trainer.train()


@pytest.mark.lengthy
def test_callbacks_of_two_datasets_log_under_two_names(model_folder, tmp_path, monkeypatch):
    callbacks = [LogTokenWeightsCallback(rows=[0], every=2, split=split) for split in ("train", "eval")]
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, max_steps=2),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(4, seed=5),
        callbacks=callbacks,
    )
    trainer.args.report_to = ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", tracker := Collected("wandb"))
    trainer.train()
    first, second = tracker.entries
    assert "token_weights/row_0/margin" in first and "token_weights/eval/row_0/margin" in second
    assert first.keys() & second.keys() == {"train/global_step"}


# Streams


def test_rows_of_a_stream_are_those_of_the_user(model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, pairs_with_identical({0, 5}).to_iterable_dataset())
    assert explain_rows(trainer, [3])[0].prompt == "cotton 3 costs"
    for row, what in ((0, "both responses are the same"), (10, "has no row 10"), (-1, "has no row -1")):
        with pytest.raises(ValueError, match=what):
            explain_rows(trainer, [row])


@pytest.mark.lengthy
def test_looking_counts_nothing(model_folder, tmp_path, monkeypatch):
    """A callback that looks five times, at a stream with one pair that is dropped."""
    args = options(tmp_path, max_steps=5, per_device_train_batch_size=1)
    callback = LogTokenWeightsCallback(rows=[4, 8], every=1)
    data = pairs_with_identical({2}).to_iterable_dataset()
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=data, callbacks=[callback])
    trainer.args.report_to = ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", tracker := Collected("wandb"))
    trainer.train()
    assert len(tracker.entries) == 5
    assert dict(trainer.dropped_pairs["train"]) == {"identical": 1}


class Pulled:
    """Counts the rows that are read of a stream of pairs."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.count = rows, 0

    def __call__(self):
        for row in self.rows:
            self.count += 1
            yield row


@pytest.mark.parametrize("known_columns", [True, False])
def test_a_stream_is_not_read_more_often_than_by_dpo(known_columns, model_folder, tmp_path):
    counts = []
    for trainer_class in (DPOTrainer, OTPOTrainer):
        pulled = Pulled(make_pairs(60))
        features = pulled.rows.features if known_columns else None
        stream = IterableDataset.from_generator(pulled, features=features).shuffle(seed=3, buffer_size=20)
        evaluation = IterableDataset.from_generator(pulled, features=features)
        trainer_class(model_folder, args=options(tmp_path), train_dataset=stream, eval_dataset=evaluation)
        counts.append(pulled.count)
    assert counts[1] <= counts[0]


def test_tokens_in_a_stream_of_unknown_columns(model_folder, tmp_path):
    tokens = make(model_folder, tmp_path, make_pairs()).train_dataset
    tokens = tokens.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    stream = IterableDataset.from_generator(lambda: iter(tokens))
    trainers = [make(model_folder, tmp_path, data, max_steps=2) for data in (tokens.to_iterable_dataset(), stream)]
    for trainer in trainers:
        trainer.train()
    first, second = (parameters(trainer.model) for trainer in trainers)
    assert all(first[name].equal(second[name]) for name in first)


def test_identical_pairs_of_a_stream_are_dropped_and_the_first_is_named(model_folder, tmp_path, caplog):
    data = pairs_with_identical({3, 7}).to_iterable_dataset().shuffle(seed=1, buffer_size=4)
    args = options(tmp_path, max_steps=8, per_device_train_batch_size=1)
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 8 and dict(trainer.dropped_pairs["train"]) == {"identical": 2}
    named = [line for line in caplog.messages if "states no preference" in line]
    assert len(named) == 1 and ("'cotton 3 costs'" in named[0] or "'cotton 7 costs'" in named[0])


def test_workers_count_what_they_drop(model_folder, tmp_path):
    data = pairs_with_identical({1, 2, 11}, 20).to_iterable_dataset(num_shards=2)
    args = options(tmp_path, max_steps=17, per_device_train_batch_size=1, dataloader_num_workers=2)
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 17 and dict(trainer.dropped_pairs["train"]) == {"identical": 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_refused_pair_of_a_shuffled_stream_is_named_by_its_text(workers, model_folder, tmp_path):
    data = pairs_with_identical({7}).to_iterable_dataset(num_shards=2).shuffle(seed=2, buffer_size=5)
    args = options(tmp_path, drop_identical_pairs=False, dataloader_num_workers=workers)
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=data)
    with pytest.raises(ValueError, match=r"as the stream was read.*'cotton 7 costs'.*drop_identical_pairs=True"):
        trainer.train()


# Many rows


@pytest.mark.lengthy
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 2, 7, 12])
def test_many_rows_are_judged_as_one_is(max_length, mode):
    """Random short lists of few tokens, so that all kinds of trouble occur, over several blocks of rows."""
    from otpo.data import token_table
    from otpo.data.preferences import PairRule, drop_unusable_pairs, find_pair

    generator = torch.Generator().manual_seed(3)

    def lists() -> list[list[int]]:
        lengths = torch.randint(0, 5, (2500,), generator=generator).tolist()
        return [torch.randint(0, 2, (length,), generator=generator).tolist() for length in lengths]

    rows = {name: lists() for name in token_table.TOKEN_COLUMNS}
    data = Dataset.from_dict(rows)
    rule = PairRule(max_length, mode, drop_identical=True)
    pairs = list(zip(*rows.values(), strict=True))
    problems = [rule.problem(*pair) for pair in pairs]
    assert {"empty", "identical"} <= set(problems) or max_length == 1
    if any(problem is None for problem in problems):
        usable, dropped, kept = drop_unusable_pairs(data, rule, "train")
        assert dict(dropped) == {name: problems.count(name) for name in ("empty", "identical")}
        assert kept.tolist() == [row for row, problem in enumerate(problems) if problem is None] and len(usable)

    def truncated(sequence: list[int]) -> list[int]:
        if max_length is None:
            return sequence
        return sequence[:max_length] if mode == "keep_start" else sequence[-max_length:]

    sequences = [tuple(tuple(truncated(prompt + each)) for each in sides) for prompt, *sides in pairs]
    for row in (0, 7, 1003, 2499):
        if all(sequences[row]):
            want = [other for other, found in enumerate(sequences) if found == sequences[row]]
            assert find_pair(data, rule, *sequences[row]) == want
