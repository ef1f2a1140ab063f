"""Rows without padding give what padded rows give: losses, every gradient, weights and metrics."""

from typing import Any

import pytest
import torch
from helpers import LOSS_TYPES, make_pairs, make_trainer

from otpo import OTPOTrainer

LAYOUTS = ["packed", "shared_prompt"]


def gradients(trainer: OTPOTrainer, inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch in training and its gradient by parameter, in float64."""
    model = trainer.model
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    found = {name: value.grad.double() for name, value in model.named_parameters() if value.grad is not None}
    return loss.item(), found


def compare(make: Any, layout: str, rows: list[int] | None = None, tolerance: float = 1e-5) -> None:
    """Compares a trainer's batch in a layout with the padded one: loss, gradients by name, and all that is logged."""
    found = {}
    for name in ("padded", layout):
        torch.manual_seed(0)
        trainer = make(name)
        assert trainer.layout.name == name
        inputs = trainer.collate([trainer.train_dataset[row] for row in rows or range(len(trainer.train_dataset))])
        loss, grads = gradients(trainer, inputs)
        logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        found[name] = (
            loss,
            grads,
            {key: value for key, value in logged.items() if not key.endswith(("/ms", "residual", "iterations"))},
        )
        assert trainer.layout.name == name
    (loss, grads, logged), (other_loss, other_grads, other_logged) = found.values()
    assert other_loss == pytest.approx(loss, rel=tolerance, abs=1e-6)
    assert grads.keys() == other_grads.keys() and grads
    scale = max(float(value.abs().max()) for value in grads.values())
    for key, value in grads.items():
        assert torch.allclose(other_grads[key], value, rtol=1e-4, atol=tolerance * scale), key
    assert logged.keys() == other_logged.keys()
    for key, value in logged.items():
        assert float(other_logged[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_loss_type(layout, loss_type, model_folder, other_model_folder, tmp_path):
    def make(name: str) -> OTPOTrainer:
        options = {"loss_type": [loss_type], "row_layout": name, **LOSS_TYPES[loss_type]}
        return make_trainer(model_folder, tmp_path, make_pairs(6), ref_model=other_model_folder, **options)

    compare(make, layout)
