"""One of two processes under plain DDP: evaluates five pairs, then the first process saves and explains alone."""

import json
import sys
from pathlib import Path

from helpers import hashed_weights, make_pairs, options
from transformers import AutoModelForCausalLM

from otpo import OTPOTrainer
from otpo.explain import explain_rows


def main(model: str, reference: str, folder: Path) -> None:
    trainer = OTPOTrainer(
        model,
        AutoModelForCausalLM.from_pretrained(reference),
        options(folder / "out", max_steps=1),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(5, seed=8),
        weighting=hashed_weights,
    )
    assert trainer.accelerator.num_processes == 2
    metrics = trainer.evaluate()
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / "metrics.json").write_text(json.dumps(metrics))
        trainer.save_model(str(folder / "saved"))
        pairs = explain_rows(trainer, [2])
        (folder / "explained.json").write_text(json.dumps([pair.name for pair in pairs]))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
