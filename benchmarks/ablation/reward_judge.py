"""A reward model as a judge: the answer with the higher reward wins, as surely as the rewards are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from otpo.pairs.reward_model import RewardModel


class RewardJudge:
    """`sigmoid(reward_a - reward_b)`, the Bradley-Terry model that reward models are trained for.

    Args:
        folder: A sequence classifier with one label and its tokenizer, as `trl.RewardTrainer` saves them. It reads
            the row's whole conversation with the answer after it, in the tokenizer's chat template.

    Raises:
        ValueError: There is no model in the folder, or it has more labels than one.
    """

    def __init__(self, folder: str | Path) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"`judge`: there is no reward model in {folder}: it has no config.json.")
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rewards = RewardModel(model.to(device), tokenizer, f"`judge`: {folder}").rewards

    def __call__(
        self,
        prompts: Sequence[str],
        answers_a: Sequence[str],
        answers_b: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        """See [`benchmarks.ablation.judges.Judge`]."""
        rewards = [self.rewards([row["prompt"] for row in rows], answers) for answers in (answers_a, answers_b)]
        return torch.sigmoid(rewards[0] - rewards[1]).tolist()
