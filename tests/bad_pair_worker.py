"""One of two processes under plain DDP, read late: one pair of one process is bad; what each of them raises."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from helpers import ODD, At, make_tokenizer, options, pairs_with_one_odd, poison
from transformers import AutoModelForCausalLM

from otpo import OTPOTrainer


def main(folder: str, found: Path) -> None:
    odd: Any = make_tokenizer().convert_tokens_to_ids(ODD)
    for name, steps in (("log", 1), ("nobody", 100)):
        args = options(found / name, max_length=40, per_device_train_batch_size=1, logging_steps=steps, max_steps=6)
        trainer = OTPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder), args=args, train_dataset=pairs_with_one_odd("chosen")
        )
        setattr(trainer, "_reads_late", True)  # noqa: B010
        model = trainer.model
        trainer.add_callback(At("on_step_begin", 2, lambda model=model: poison(model, odd)))
        try:
            trainer.train()
            said = ""
        except FloatingPointError as error:
            said = str(error)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (found / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps([said, trainer.state.global_step, losses]))
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
