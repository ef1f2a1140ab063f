"""What users do with a trainer: options used twice, other datasets, models as objects, metrics of their own."""

import copy
from typing import Any

import pytest
import torch
from helpers import (
    assert_same_parameters,
    collate,
    make_pairs,
    make_trainer,
    options,
    parameters,
    train_and_evaluate,
)
from written_loss import load

from otpo import OTPOTrainer


def test_one_set_of_options_for_two_trainers(model_folder, tmp_path):
    args = options(tmp_path, ot_reg=0.05, max_length=40)
    before = copy.deepcopy(args)
    runs = [
        train_and_evaluate(OTPOTrainer(model_folder, args=used, train_dataset=make_pairs()))
        for used in (args, args, copy.deepcopy(args))
    ]
    assert args.to_dict() == before.to_dict()
    assert runs[0].losses == runs[1].losses == runs[2].losses


def test_options_survive_a_failing_dataset(model_folder, tmp_path):
    args = options(tmp_path, max_length=40)
    broken = make_pairs().map(lambda row: {"chosen": None})
    with pytest.raises(Exception):  # noqa: B017  whatever TRL says of it
        OTPOTrainer(model_folder, args=args, train_dataset=broken)
    assert args.max_length == 40


def test_evaluating_other_datasets(model_folder, tmp_path):
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, ot_reg=0.05), train_dataset=make_pairs())
    trainer.train()
    other = make_pairs(5, seed=8)
    plain = trainer.evaluate(other)
    stream = trainer.evaluate(other.to_iterable_dataset())
    several = trainer.evaluate({"a": other, "b": make_pairs(3, seed=9)})
    for name in ("eval_loss", "eval_weights/ess", "eval_rewards/margins", "eval_rewards/margins_unweighted"):
        assert plain[name] == stream[name]
    assert several["eval_a_loss"] == plain["eval_loss"] != several["eval_b_loss"]
    assert trainer.dropped_pairs.keys() >= {"train", "eval", "a", "b"}
    with pytest.raises(ValueError, match=r"eval dataset lacks the column\(s\) \['chosen'\]"):
        trainer.evaluate(other.rename_column("chosen", "good"))


def test_tokenized_datasets(model_folder, tmp_path):
    """A dataset that was tokenized before, as the docstring of `DPOTrainer.evaluate` promises, is taken as it is."""
    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs())
    tokens = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    want = train_and_evaluate(trainer)
    got = train_and_evaluate(OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=tokens))
    assert got.losses == want.losses


def test_compute_metrics_gets_the_logits(model_folder, tmp_path):
    shapes = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"largest": float(prediction.predictions.max())}

    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, loss_type=["sigmoid", "ipo"], ot_reg=0.05),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(4, seed=3),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    width = collate(trainer, [0, 1, 2, 3], "eval")["input_ids"].size(1)
    assert shapes == [(8, width, len(trainer.processing_class))]
    assert {"eval_largest", "eval_weights/ess", "eval_rewards/margins_unweighted"} <= metrics.keys()


def test_loaded_model_and_its_own_reference(model_folder, tmp_path):
    """A model object trains as its folder does."""
    runs = [
        train_and_evaluate(OTPOTrainer(model, args=options(tmp_path, ot_reg=0.05), train_dataset=make_pairs()))
        for model in (model_folder, load(model_folder, dtype=torch.float32))
    ]
    assert runs[0].losses == runs[1].losses
    assert_same_parameters(parameters(runs[0].trainer.model), parameters(runs[1].trainer.model))


@pytest.mark.parametrize("between", ["training", "steps_by_hand"])
def test_training_twice(between, model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(), learning_rate=0.1)
    if between == "training":
        trainer.train()
    else:
        trainer.model.train()
        trainer.compute_loss(trainer.model, collate(trainer, [0, 1, 2, 3])).backward()
        torch.optim.SGD(trainer.model.parameters(), lr=1.0).step()
    trainer.train()
    assert trainer.state.global_step == 4
