"""A reward model as a judge: the answer with the higher reward wins, as surely as the rewards are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

_BATCH = 32


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
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        if model.config.num_labels != 1:
            raise ValueError(f"`judge`: {folder} has {model.config.num_labels} labels, a reward model has one.")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

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

    @torch.no_grad()
    def rewards(self, conversations: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]) -> torch.Tensor:
        """The reward of each answer at the end of its conversation, `(N,)` float64."""
        texts = [
            [*conversation, {"role": "assistant", "content": answer}]
            for conversation, answer in zip(conversations, answers, strict=True)
        ]
        rewards = []
        for begin in range(0, len(texts), _BATCH):
            inputs = self.tokenizer.apply_chat_template(
                texts[begin : begin + _BATCH], padding=True, return_tensors="pt", return_dict=True
            ).to(self.model.device)
            rewards.append(self.model(**inputs).logits[:, 0].double().cpu())
        return torch.cat(rewards)
