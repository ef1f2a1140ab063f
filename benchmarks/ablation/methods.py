"""What trains a cell: the library's trainer, or a rival that is no weighting alone."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback

from otpo import OTPOTrainer
from otpo.weighting import PairBatch

from .rivals.contrastive import ContrastiveWeighting
from .rivals.tdpo import TDPOTrainer


class Ordered:
    """A trainer's mixin that remembers which batches came in which order, as a digest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.order = hashlib.sha256()
        super().__init__(*args, **kwargs)

    def token_weights(self, batch: PairBatch) -> Any:
        self.order.update((batch.token_ids * batch.mask).cpu().numpy().tobytes())
        return super().token_weights(batch)  # pyright: ignore[reportAttributeAccessIssue]


class OrderedTrainer(Ordered, OTPOTrainer):
    """What trains the cells of weightings."""


class OrderedTDPOTrainer(Ordered, TDPOTrainer):
    """What trains TDPO2's."""


def tis_trainer(model: PreTrainedModel, *, train_dataset: Dataset, **kwargs: Any) -> OrderedTrainer:
    """TIS-DPO (arXiv 2410.04350), its weights by forward and reverse DPO, without its divergence term.

    Both contrastive models start from the cell's and take its steps on its pairs, one of them with the sides
    exchanged; so a cell costs three trainings. They stay on the device beside policy and reference.
    """
    exchanged = train_dataset.map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]})
    experts = [_trained(model, pairs, kwargs) for pairs in (train_dataset, exchanged)]
    return OrderedTrainer(model, train_dataset=train_dataset, weighting=ContrastiveWeighting(*experts), **kwargs)


def _trained(model: PreTrainedModel, pairs: Dataset, kwargs: dict[str, Any]) -> Any:
    trainer = OTPOTrainer(copy.deepcopy(model), train_dataset=pairs, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval()


TRAINERS: dict[str, Callable[..., Any]] = {
    "otpo": OrderedTrainer,
    "tdpo2": OrderedTDPOTrainer,
    "tis": tis_trainer,
}
"""By the names of `cells.METHODS`; each takes what an `OTPOTrainer` takes, by name after the model."""
