"""What `OTPOTrainer` logs beside TRL's numbers, by name and by value."""

import math

import pytest
import torch
from helpers import (
    collate,
    hashed_weights,
    make_pairs,
    options,
)
from trl import DPOTrainer
from written_loss import Written, load

from otpo import OTPOTrainer, TokenWeights

WEIGHT_NAMES = {"weights/entropy", "weights/ess", "weights/max"}
TRANSPORT_NAMES = {"transport/residual", "transport/iterations", "transport/ms"}
REWARD_NAMES = {f"rewards/{name}_unweighted" for name in ("chosen", "rejected", "margins", "accuracies")}


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("otpo", WEIGHT_NAMES | TRANSPORT_NAMES | REWARD_NAMES), ("budget", WEIGHT_NAMES | REWARD_NAMES)],
)
def test_names_in_the_log(weighting, expected, model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, weighting=weighting),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(6, seed=3),
    )
    trainer.train()
    evaluated = trainer.evaluate()
    own = ("weights/", "transport/", "unweighted")
    logged = trainer.state.log_history[0]
    assert {name for name in logged if any(part in name for part in own)} == expected
    assert {name for name in evaluated if any(part in name for part in own)} == {f"eval_{n}" for n in expected}
    assert all(math.isfinite(value) for value in evaluated.values())
    if weighting == "otpo":
        assert logged["transport/ms"] > 0
        assert 0 <= logged["transport/residual"] <= 1e-6
        assert logged["transport/iterations"] >= 1


def test_values_in_the_log(model_folder, other_model_folder, tmp_path):
    """By hand, over all pairs of batches of 4 and 2."""
    beta = 0.3
    trainer = OTPOTrainer(
        model_folder,
        load(other_model_folder),
        options(tmp_path, beta=beta),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(6, seed=3),
        weighting=lambda batch: TokenWeights(hashed_weights(batch), {"mine/size": len(batch.mask)}),
    )
    got = trainer.evaluate()

    written = Written(load(model_folder), load(other_model_folder), hashed_weights, beta=beta)
    sums: dict[str, float] = {}
    for rows in ([0, 1, 2, 3], [4, 5]):
        loss = written(collate(trainer, rows, "eval")).item()
        found = {"loss": loss, "mine/size": 2.0 * len(rows)}
        entropy, ess, largest = [], [], []
        for weights, mask in zip(written.weights, written.seen.mask, strict=True):
            values = weights[mask].tolist()
            shares = [value / sum(values) for value in values]
            entropy.append(-sum(share * math.log(share) for share in shares) / math.log(len(shares)))
            ess.append(sum(values) ** 2 / (len(values) * sum(value**2 for value in values)))
            largest.append(max(values) * len(values) / sum(values))
        for name, values in (("entropy", entropy), ("ess", ess), ("max", largest)):
            found[f"weights/{name}"] = sum(values) / len(values)
        for suffix, weights in (("_unweighted", torch.ones_like(written.weights)), ("", written.weights)):
            chosen, rejected = (beta * (written.log_ratios * weights).sum(1)).chunk(2)
            found[f"rewards/chosen{suffix}"] = chosen.mean().item()
            found[f"rewards/rejected{suffix}"] = rejected.mean().item()
            found[f"rewards/margins{suffix}"] = (chosen - rejected).mean().item()
            found[f"rewards/accuracies{suffix}"] = (chosen > rejected).double().mean().item()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(rows) / 6
    assert got["eval_rewards/margins"] != pytest.approx(got["eval_rewards/margins_unweighted"], rel=1e-2)
    for name, value in sums.items():
        assert got[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_times_of_training_and_evaluation_stay_apart(model_folder, tmp_path, monkeypatch):
    """Evaluation in the middle of a logging interval must not take the training's times with it."""
    counts: list[tuple[str, int]] = []
    original = DPOTrainer.log

    def counted(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        found = self._metrics[mode]
        if "weights/ess" in found:
            counts.append((mode, len(found["transport/ms"])))
        original(self, logs, start_time)

    monkeypatch.setattr(DPOTrainer, "log", counted)
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(6, seed=3),
    )
    trainer.train()
    assert sorted(counts) == [("eval", 2), ("eval", 2), ("train", 4)]


def test_auxiliary_loss_of_experts(moe_folder, tmp_path):
    """It is logged, and added to the weighted loss once, however many loss types there are."""
    losses = {}
    for coefficient in (0.0, 0.5):
        trainer = OTPOTrainer(
            moe_folder,
            args=options(tmp_path, ot_reg=0.05, loss_type=["sigmoid", "ipo", "sft"], router_aux_loss_coef=coefficient),
            train_dataset=make_pairs(),
        )
        trainer.train()
        losses[coefficient] = trainer.state.log_history[0]
    auxiliary = losses[0.5]["aux_loss"]
    assert auxiliary > 0.1 and "aux_loss" not in losses[0.0]
    assert losses[0.5]["loss"] == pytest.approx(losses[0.0]["loss"] + 0.5 * auxiliary, rel=1e-5)
    assert losses[0.5]["num_tokens"] == losses[0.0]["num_tokens"]
