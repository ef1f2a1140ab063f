"""One of two processes under plain DDP: trains on nine pairs, once with its numbers read at once and once late."""

import json
import sys
from pathlib import Path

from helpers import hashed_weights, make_pairs, options, without_timing
from transformers import AutoModelForCausalLM

from otpo import OTPOTrainer


def main(model: str, reference: str, folder: Path) -> None:
    for late in (False, True):
        trainer = OTPOTrainer(
            model,
            AutoModelForCausalLM.from_pretrained(reference),
            options(folder / "out", max_steps=4, per_device_train_batch_size=2, loss_type=["sigmoid", "ipo"]),
            train_dataset=make_pairs(9),
            weighting=hashed_weights,
        )
        assert trainer.accelerator.num_processes == 2
        trainer._reads_late = late
        trainer.train()
        if trainer.is_world_process_zero():
            log = [without_timing(entry) for entry in trainer.state.log_history]
            (folder / f"{late}.json").write_text(json.dumps(log))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
