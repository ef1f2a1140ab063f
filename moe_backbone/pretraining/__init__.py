"""Pretraining: the trainer, packed rows, mixtures of sources and their documents."""

from .trainer import PretrainingConfig as PretrainingConfig
from .trainer import PretrainingTrainer as PretrainingTrainer
