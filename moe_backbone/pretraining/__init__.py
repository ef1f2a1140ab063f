"""Pretraining: the trainer, packed rows, mixtures of sources and their documents.

The trainer is imported when one of its names is touched, so that a mixture can be read without transformers' Trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import PretrainingConfig as PretrainingConfig
    from .trainer import PretrainingTrainer as PretrainingTrainer


def __getattr__(name: str) -> Any:
    if name not in ("PretrainingConfig", "PretrainingTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("moe_backbone.pretraining.trainer"), name)
