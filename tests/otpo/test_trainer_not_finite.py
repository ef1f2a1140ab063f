"""Numbers that are not finite: a bad step spoils neither parameters nor checkpoints; empty sides spoil nothing."""

import math
from typing import Any

import pytest
import torch
from helpers import (
    ODD,
    At,
    bits,
    collate,
    folder_bytes,
    hashed_weights,
    make_pairs,
    make_plain_pairs,
    make_trainer,
    options,
    pairs_with_one_odd,
    parameters,
    poison,
    train_and_evaluate,
    with_images,
)
from transformers import AutoModelForCausalLM

from moe_backbone.expert_parallel.deepspeed_trainer import ExpertParallelMixin
from moe_backbone.expert_parallel.native_trainer import NativeExpertParallelMixin
from otpo import OTPOTrainer


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_that_is_not_finite_is_named(side, model_folder, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make_trainer(model, tmp_path, pairs_with_one_odd(side), max_length=40)
    poison(model, tokenizer.convert_tokens_to_ids(ODD))
    rows = [list(trainer.train_dataset["prompt"]).index(f"cotton {i} costs") for i in (1, 3, 4)]
    odd = next(i for i, row in enumerate(trainer.train_dataset) if ODD in row[side])
    batch = collate(trainer, [rows[0], rows[1], odd, rows[2]])
    with pytest.raises(FloatingPointError, match=r"(?i)states.* pair\(s\) \[2\] of the micro-batch \(row\(s\) 5 of"):
        trainer.compute_loss(trainer.model, batch)


def test_a_step_that_is_not_finite_changes_nothing(model_folder, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make_trainer(
        model,
        tmp_path / "out",
        pairs_with_one_odd("chosen"),
        max_length=40,
        per_device_train_batch_size=6,
        save_strategy="steps",
        save_steps=1,
    )
    kept: dict[str, Any] = {}

    def spoil() -> None:
        poison(model, tokenizer.convert_tokens_to_ids(ODD))
        kept["parameters"] = bits(parameters(model))
        kept["checkpoint"] = folder_bytes(tmp_path / "out" / "checkpoint-2")

    trainer.add_callback(At("on_step_begin", 2, spoil))
    with pytest.raises(FloatingPointError, match=r"row\(s\) 5 of the training.*after 2 optimizer step.*No update"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert bits(parameters(model)) == kept["parameters"]
    assert len(kept["checkpoint"]) > 5
    assert folder_bytes(tmp_path / "out" / "checkpoint-2") == kept["checkpoint"]
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def nan_of_the_second_pair(batch: Any) -> torch.Tensor:
    weights = hashed_weights(batch)
    weights[1, batch.mask[1]] = math.nan
    return weights


def infinite_once(batch: Any) -> torch.Tensor:
    return torch.where((batch.positions == 0) & batch.mask, math.inf, 1.0)


@pytest.mark.parametrize("weighting", [nan_of_the_second_pair, infinite_once], ids=["nan", "inf"])
def test_weights_that_are_not_finite(weighting, model_folder, tmp_path):
    """Once they reach an update, every parameter is NaN: the step must stop before it, and say what was wrong."""
    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    before = bits(parameters(trainer.model))
    with pytest.raises(FloatingPointError, match=r"(?i)weights.*not finite.*after 0 optimizer step") as error:
        trainer.train()
    if weighting is nan_of_the_second_pair:
        assert "pair(s) [1]" in str(error.value)
    assert bits(parameters(trainer.model)) == before


@pytest.mark.parametrize("precompute", [False, True], ids=["online", "precomputed"])
def test_a_reference_that_is_not_finite(precompute, model_folder, tmp_path, tokenizer):
    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    poison(reference, tokenizer.convert_tokens_to_ids(ODD))
    trainer = OTPOTrainer(
        model_folder,
        reference,
        options(tmp_path, max_length=40, per_device_train_batch_size=6, precompute_ref_log_probs=precompute),
        train_dataset=pairs_with_one_odd("rejected"),
    )
    before = bits(parameters(trainer.model))
    with pytest.raises(FloatingPointError, match=r"(?i)reference.*row\(s\) 5 of the training.*not finite"):
        trainer.train()
    assert bits(parameters(trainer.model)) == before


def test_spoilt_parameters_are_not_saved(model_folder, tmp_path):
    """NaN between steps: neither a checkpoint nor a save over an earlier one."""
    trainer = make_trainer(
        model_folder, tmp_path / "out", make_pairs(), save_strategy="steps", save_steps=1, save_total_limit=1
    )
    kept: dict[str, Any] = {}

    def spoil() -> None:
        kept["checkpoint"] = folder_bytes(tmp_path / "out" / "checkpoint-1")
        trainer.save_model(str(tmp_path / "mine"))
        kept["mine"] = folder_bytes(tmp_path / "mine")
        with torch.no_grad():
            trainer.model.lm_head.weight[3, 4] = math.nan

    trainer.add_callback(At("on_step_end", 2, spoil))
    with pytest.raises(FloatingPointError, match=r"parameters that are not finite after 2 optimizer step.*not saved"):
        trainer.train()
    assert "model.safetensors" in kept["checkpoint"] and "model.safetensors" in kept["mine"]
    assert folder_bytes(tmp_path / "out" / "checkpoint-1") == kept["checkpoint"]
    assert not (tmp_path / "out" / "checkpoint-2").exists()

    for folder in ("mine", "new"):
        with pytest.raises(FloatingPointError, match="not finite"):
            trainer.save_model(str(tmp_path / folder))
    assert folder_bytes(tmp_path / "mine") == kept["mine"]
    assert not (tmp_path / "new").exists()


def test_infinite_parameters_are_not_saved(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs())
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.save_model(str(tmp_path / "new"))


@pytest.mark.parametrize("mixin", [ExpertParallelMixin, NativeExpertParallelMixin])
def test_infinite_parameters_are_not_saved_where_experts_are_spread(model_folder, tmp_path, monkeypatch, mixin):
    """Such a trainer writes its models itself."""
    trainer = make_trainer(model_folder, tmp_path, make_pairs())
    trainer.__class__ = type("Spread", (mixin, type(trainer)), {"ep_size": 1, "exchange": "auto"})
    monkeypatch.setattr("moe_backbone.expert_parallel.deepspeed_layer.parallel_experts", lambda _: iter([1]))
    monkeypatch.setattr("moe_backbone.expert_parallel.native_trainer.has_adapter", lambda _: True)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.save_model(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


# Empty sides that only the collator can see


def losses_and_gradients(trainer: OTPOTrainer, batch: dict[str, Any]) -> tuple[float, bool]:
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = [value.grad for value in trainer.model.parameters() if value.grad is not None]
    return loss.item(), all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "sft", "aot"])
@pytest.mark.parametrize("weighting", ["otpo", "budget", "length", "sampo"])
def test_empty_sides_at_the_collator(weighting, loss_type, model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, make_pairs(), weighting=weighting, loss_type=[loss_type])
    batch = collate(trainer, [0, 1, 2, 3])
    batch["completion_mask"][0] = 0  # the chosen side of pair 0
    batch["completion_mask"][5] = 0  # the rejected side of pair 1
    batch["completion_mask"][[2, 6]] = 0  # both of pair 2
    loss, finite = losses_and_gradients(trainer, batch)
    assert math.isfinite(loss) and finite
    trainer._metrics["train"] = {name: list(values) for name, values in trainer._metrics["train"].items()}
    assert all(math.isfinite(value) for values in trainer._metrics["train"].values() for value in values)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_empty_sides_of_images(loss_type, vision_folder, tmp_path):
    """Vision datasets are tokenized in the collator, so no pair of theirs is dropped beforehand."""
    rows = [("<image>a box", " red", " blue"), ("<image>the box", "", " no"), ("<image>today", " a", "")]
    trainer = make_trainer(
        vision_folder,
        tmp_path,
        with_images(make_plain_pairs(rows)),
        loss_type=[loss_type],
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=3,
    )
    batch = dict(trainer.data_collator([trainer.train_dataset[row] for row in range(3)]))
    assert sorted(batch["completion_mask"].sum(1).tolist())[:2] == [0, 0]
    loss, finite = losses_and_gradients(trainer, batch)
    assert math.isfinite(loss) and finite
    run = train_and_evaluate(trainer)
    assert all(math.isfinite(loss) for loss in run.losses)
