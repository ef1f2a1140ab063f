"""Aligns a chat model on bundled pairs with OTPO, saves it, and says how often it prefers the right answer.

python examples/quickstart.py HuggingFaceTB/SmolLM2-135M-Instruct runs/quickstart
"""

import sys

import torch

from otpo import OTPOConfig, OTPOTrainer
from otpo.data import load_demo_preferences


def main(model: str, output: str) -> None:
    gpu = torch.cuda.is_available()
    args = OTPOConfig(
        output_dir=output,
        weighting="otpo",  # "uniform" is DPO; try "contrast" or "diff"
        ot_reg=0.1,
        max_steps=10,
        per_device_train_batch_size=4,
        logging_steps=5,
        report_to="none",
        use_cpu=not gpu,
        bf16=gpu,
    )
    pairs = load_demo_preferences("train", ["en"])  # rows of `prompt`, `chosen` and `rejected`
    held_out = load_demo_preferences("test", ["en"], count=16)
    trainer = OTPOTrainer(model, args=args, train_dataset=pairs, eval_dataset=held_out)
    trainer.train()
    trainer.save_model()
    numbers = trainer.evaluate()
    print(f"right answer preferred: {numbers['eval_rewards/accuracies']:.0%} of {len(held_out)} pairs")


if __name__ == "__main__":
    main(*sys.argv[1:])
