"""The weighted loss and its gradients, against the loss written out in float64 from the models' logits."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    assert_same_parameters,
    collate,
    hashed_weights,
    make_pairs,
    option_dict,
    options,
    train_and_evaluate,
    with_images,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer
from written_loss import LORA, SGD, Written, load, uneven_pairs, written_budget, written_otpo

from otpo import OTPOConfig, OTPOTrainer, PairBatch

# Each weighting: the trainer's options, its argument `weighting`, and the same written out.
WEIGHTS: dict[str, tuple[dict[str, Any], Any, Callable[[PairBatch], Tensor]]] = {
    "otpo": ({"ot_reg": 0.05}, None, written_otpo(0.05)),
    "otpo-pairwise": (
        {"ot_reg": 0.1, "ot_reg_m": 1.0, "ot_cost_scale": "pairwise"},
        None,
        written_otpo(0.1, 1.0, cost_scale="pairwise"),
    ),
    "otpo-cosine": ({"ot_reg": 0.02, "ot_cost": "cosine"}, None, written_otpo(0.02, cost="cosine")),
    "hashed": ({}, hashed_weights, hashed_weights),
    "budget": ({"weighting": "budget"}, None, written_budget),
}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "beta": {"beta": 0.5},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "sft": {"loss_type": ["sft"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "sft-ipo-sigmoid": {"loss_type": ["sft", "ipo", "sigmoid"], "loss_weights": [0.5, 0.3, 2.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "wpo": {"use_weighting": True},
    "wpo-ipo": {"use_weighting": True, "loss_type": ["ipo"]},
}
PAIRINGS = [(loss, name) for loss in LOSSES for name in ("otpo", "hashed")]
PAIRINGS += [("sigmoid", name) for name in ("otpo-pairwise", "otpo-cosine", "budget")] + [("ipo", "budget")]


@pytest.mark.parametrize(("loss", "weights"), PAIRINGS, ids=[f"{loss}-{weights}" for loss, weights in PAIRINGS])
def test_loss_and_every_gradient(loss, weights, model_folder, other_model_folder, tmp_path):
    settings, argument, weigh = WEIGHTS[weights]
    trainer = OTPOTrainer(
        model_folder,
        load(other_model_folder),
        options(tmp_path, **settings, **LOSSES[loss]),
        train_dataset=uneven_pairs(),
        weighting=argument,
    )
    batch = collate(trainer, list(range(7)))
    got = trainer.compute_loss(trainer.model, batch)
    got.backward()

    written = Written(load(model_folder), load(other_model_folder), weigh, **LOSSES[loss])
    want = written(batch)
    want.backward()

    # The trainer works in float32 on sums of up to twenty log-probabilities near -5.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = {name: value.grad for name, value in trainer.model.named_parameters()}
    for name, value in written.policy.named_parameters():
        scale = value.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name].double(), value.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("weights", ["otpo", "hashed", "budget"])
def test_first_steps_of_a_training(weights, model_folder, other_model_folder, tmp_path):
    """Three steps of plain gradient descent on the whole dataset, whose order then does not matter."""
    settings, argument, weigh = WEIGHTS[weights]
    trainer = OTPOTrainer(
        model_folder,
        load(other_model_folder),
        options(tmp_path, **SGD, **settings, per_device_train_batch_size=7, max_steps=3),
        train_dataset=uneven_pairs(),
        weighting=argument,
    )
    batch = collate(trainer, list(range(7)))
    run = train_and_evaluate(trainer)

    written = Written(load(model_folder), load(other_model_folder), weigh)
    descent = torch.optim.SGD(written.policy.parameters(), lr=SGD["learning_rate"])
    losses = []
    for step in range(3):
        loss = written(batch, step)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[0] > losses[2] + 0.01
    torch.testing.assert_close(run.losses, losses, rtol=1e-4, atol=1e-5)
    for name, value in written.policy.named_parameters():
        torch.testing.assert_close(run.after[name].double(), value.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_lora_loss_and_every_gradient(model_folder, other_model_folder, tmp_path):
    torch.manual_seed(2)
    policy = get_peft_model(load(model_folder), LoraConfig(**LORA, init_lora_weights=False))
    written = Written(copy.deepcopy(policy), load(other_model_folder), written_otpo(0.05))
    trainer = OTPOTrainer(
        policy, load(other_model_folder), options(tmp_path, ot_reg=0.05), train_dataset=uneven_pairs()
    )
    batch = collate(trainer, [0, 3, 6])
    got, want = trainer.compute_loss(trainer.model, batch), written(batch)
    got.backward()
    want.backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    theirs = {name: value.grad for name, value in written.policy.named_parameters() if value.grad is not None}
    ours = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    assert ours.keys() == theirs.keys() and all("lora" in name for name in ours)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


def test_vision_loss_and_every_gradient(vision_folder, tmp_path):
    """Images lengthen the prompt and the collator pads it: states, tokens and weights must still line up."""

    def load_vision(seed: int) -> Any:
        model = LlavaForConditionalGeneration.from_pretrained(vision_folder, dtype=torch.float32)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn(value.shape, generator=noise), alpha=0.05)
        return model

    trainer = OTPOTrainer(
        load_vision(1),
        load_vision(2),
        options(tmp_path, ot_reg=0.05, max_length=None),
        train_dataset=with_images(make_pairs()),
    )
    batch = dict(trainer.data_collator([trainer.train_dataset[row] for row in range(5)]))
    got = trainer.compute_loss(trainer.model, batch)
    got.backward()
    written = Written(load_vision(1), load_vision(2), written_otpo(0.05))
    want = written(batch)
    want.backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = {name: value.grad for name, value in trainer.model.named_parameters()}
    expected = {name: value.grad for name, value in written.policy.named_parameters() if value.grad is not None}
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():  # the keys' biases have none but rounding, hence one scale for all
        torch.testing.assert_close(gradients[name].double(), value, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert any(value.abs().max() > 1e-3 * largest for name, value in expected.items() if "vision_tower" in name)


def test_sft_does_not_see_the_weights(model_folder, tmp_path):
    runs = []
    for trainer_class, config_class, extra in (
        (DPOTrainer, DPOConfig, {}),
        (OTPOTrainer, OTPOConfig, {"weighting": hashed_weights}),
    ):
        args = config_class(**option_dict(tmp_path, loss_type=["sft"]))
        runs.append(train_and_evaluate(trainer_class(model_folder, args=args, train_dataset=make_pairs(), **extra)))
    assert runs[0].losses == runs[1].losses
    assert_same_parameters(runs[0].after, runs[1].after)
