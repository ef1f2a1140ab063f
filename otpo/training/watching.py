"""Callbacks that look at the trainer itself, which transformers hands to no callback."""

from typing import Any

from transformers import TrainerCallback


class TrainerWatcher(TrainerCallback):
    """A callback that gets to know the trainer: [`otpo.OTPOTrainer.train`] calls `attach` before its first step."""

    def attach(self, trainer: Any) -> None:
        """Takes the trainer that the callback looks at.

        Args:
            trainer: An [`otpo.OTPOTrainer`].
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it does with the trainer.")
