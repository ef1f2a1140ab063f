"""A reward model: a sequence classifier with one label, which scores an answer at the end of its conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_BATCH = 32


class RewardModel:
    """A [`otpo.pairs.judges.Judge`] whose scores are a reward model's.

    Args:
        model: A sequence classifier, as `trl.RewardTrainer` saves them, on its device.
        tokenizer: Its tokenizer, whose chat template conversations are written in.
        name: What the model is called in messages.

    Raises:
        ValueError: The model has more labels than one, or the tokenizer can't pad.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "the reward model") -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"{name} has {model.config.num_labels} labels, a reward model has one. Name another.")
        if tokenizer.pad_token_id is None:
            raise ValueError(f"The tokenizer of {name} has no token to pad with. Set its `pad_token` and save it.")
        self.model, self.tokenizer = model.eval(), tokenizer

    def __call__(self, prompt: Any, answers: list[str], row: Mapping[str, Any]) -> list[float]:
        """The reward of each answer."""
        if isinstance(prompt, str):
            return self._rewards([self.tokenizer(prompt + answer)["input_ids"] for answer in answers]).tolist()
        return self.rewards([prompt] * len(answers), answers).tolist()

    def rewards(self, conversations: Sequence[Sequence[Mapping[str, str]]], answers: Sequence[str]) -> torch.Tensor:
        """The reward of each answer at the end of its conversation, `(N,)` float64."""
        made = []
        for conversation, answer in zip(conversations, answers, strict=True):
            messages = [*conversation, {"role": "assistant", "content": answer}]
            made.append(self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        return self._rewards(made)

    @torch.no_grad()
    def _rewards(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        rewards = []
        for begin in range(0, len(texts), _BATCH):
            batch = {"input_ids": list(texts[begin : begin + _BATCH])}
            inputs = self.tokenizer.pad(batch, return_tensors="pt").to(self.model.device)
            rewards.append(self.model(**inputs).logits[:, 0].double().cpu())
        return torch.cat(rewards)
