"""One of two processes under plain DDP whose batches are made by a number of tokens: gradients, the log, resuming."""

import json
import sys
from pathlib import Path

import torch
from budget_helpers import BUDGET, PAIRS, rows_by_step, still_trainer
from helpers import history, make_pairs, options, parameters

from otpo import OTPOTrainer

LOGGED = ("loss", "rewards/margins", "rewards/margins_unweighted", "weights/ess", "logps/chosen")


def main(model: str, reference: str, folder: Path) -> None:
    # Gradients of every step of two epochs, which the first process writes down; the log as on the CPU and on a GPU.
    logs = []
    for late in (True, False):
        trainer, kept = still_trainer(model, reference, folder / f"still-{late}", gradient_accumulation_steps=2)
        setattr(trainer, "_reads_late", late)  # noqa: B010
        trainer.train()
        logs.append(history(trainer, *LOGGED))
    budget = trainer.token_budget()
    assert budget is not None and budget.processes == 2 and PAIRS % 2
    steps = [{name.removeprefix("module."): value for name, value in step.items()} for step in kept.steps]

    # A run of three epochs, and its last part again from a checkpoint in the second epoch's middle.
    def train(checkpoint: str | None = None) -> OTPOTrainer:
        args = options(
            folder / "run",
            **{"tokens_per_batch": BUDGET, "max_steps": -1, "num_train_epochs": 3, "ot_reg": 0.05},
            **{"save_strategy": "steps", "save_steps": len(budget) + 2},
        )
        again = OTPOTrainer(model, args=args, train_dataset=make_pairs(PAIRS))
        again.train(resume_from_checkpoint=checkpoint)
        return again

    straight = train()
    resumed = train(str(folder / "run" / f"checkpoint-{len(budget) + 2}"))
    if trainer.is_world_process_zero():
        torch.save({"gradients": steps, "rows": rows_by_step(trainer)}, folder / "steps.pt")
        (folder / "log.json").write_text(json.dumps(logs))
        found = [parameters(each.model) for each in (straight, resumed)]
        same = all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        trajectories = [history(each, "step", "loss", "grad_norm") for each in (straight, resumed)]
        (folder / "resumed.json").write_text(json.dumps({"same": same, "logs": trajectories, "steps": len(budget)}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
