"""Two weightings of one's own: a function of a batch, and a method of a subclass. No gradient flows through either.

python examples/own_weighting.py HuggingFaceTB/SmolLM2-135M-Instruct runs/own
"""

import sys

import torch

from otpo import OTPOConfig, OTPOTrainer, PairBatch
from otpo.data import load_demo_preferences


def confident(batch: PairBatch) -> torch.Tensor:
    """Counts a token by the policy's probability of it, `(2B, T)`: B chosen responses, then the B rejected ones."""
    return batch.logps.exp()


class LastTokensTrainer(OTPOTrainer):
    """Counts the last eight tokens of a response alone."""

    def token_weights(self, batch: PairBatch) -> torch.Tensor:
        return (batch.positions >= batch.lengths - 8).float()


def main(model: str, output: str) -> None:
    gpu = torch.cuda.is_available()
    args = OTPOConfig(output_dir=output, max_steps=2, report_to="none", use_cpu=not gpu, bf16=gpu)
    pairs = load_demo_preferences("train", ["en"], count=16)
    by_function = OTPOTrainer(model, args=args, train_dataset=pairs, weighting=confident)
    by_method = LastTokensTrainer(model, args=args, train_dataset=pairs)
    for trainer in (by_function, by_method):
        loss = trainer.train().training_loss
        print(f"{type(trainer).__name__}, {trainer.describe_weighting()}: mean loss {loss:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
