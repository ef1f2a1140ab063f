"""Trainers whose batches are made by a number of tokens, what is known of their steps, and the same as one batch."""

from pathlib import Path
from typing import Any

import torch
from helpers import make_pairs, options
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from otpo import OTPOTrainer

PAIRS = 13
BUDGET = 150
"""Tokens: between two and seven of the pairs, so that 13 of them make four or more micro-batches."""


class Gradients(TrainerCallback):
    """Keeps each step's gradients by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: value.grad.clone() for name, value in named if value.grad is not None})


def still_trainer(model: str, reference: str, folder: Path, **changes: Any) -> tuple[OTPOTrainer, Gradients]:
    """A trainer that learns nothing, so that all its steps' gradients are those of one model."""
    kept = Gradients()
    settings = {
        **{"learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": -1, "num_train_epochs": 2},
        **{"tokens_per_batch": BUDGET, "ot_reg": 0.05, **changes},
    }
    trainer = OTPOTrainer(
        model,
        AutoModelForCausalLM.from_pretrained(reference),
        options(folder, **settings),
        train_dataset=make_pairs(PAIRS),
        callbacks=[kept],
    )
    return trainer, kept


def rows_by_step(trainer: OTPOTrainer, epochs: int = 2) -> list[list[int]]:
    """The rows of the dataset in each optimizer step, of all processes, without repeated ones."""
    budget, together = trainer.token_budget(), trainer.args.gradient_accumulation_steps
    assert budget is not None
    steps = []
    for epoch in range(epochs):
        plan = budget.epoch(epoch)
        for first in range(0, len(budget), together):
            rows: list[int] = []
            for step in range(first, min(first + together, len(budget))):
                for process in range(budget.processes):
                    pairs, own, _ = plan.batch(step, process)
                    rows += pairs if own else []
            steps.append(rows)
    return steps


def as_one_batch(trainer: OTPOTrainer, rows: list[int]) -> tuple[float, dict[str, Tensor]]:
    """The loss of rows in a single batch, without any of the training loop, and its gradients by name."""
    batch = trainer.collate([trainer.train_dataset[row] for row in rows])
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: value.grad.clone() for name, value in named if value.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and any(value.abs().max() > 1e-3 for value in want.values())
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
