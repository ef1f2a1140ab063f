"""Adapters that are merged into their models, tied embeddings among them."""

import warnings
from typing import Any

import torch
from torch import nn

_TIED = r"(?s)\s*Model with `tie_word_embeddings=True`|Model has `tie_word_embeddings=True`"


def load_adapter(model: Any, folder: str, **options: Any) -> Any:
    """`PeftModel.from_pretrained` without its warnings of what [`merge_adapter`] takes care of.

    Args:
        model: The model under the adapter.
        folder: Of the adapter.
        options: Of `PeftModel.from_pretrained`.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_TIED)
        return PeftModel.from_pretrained(model, folder, **options)


def merge_adapter(adapted: Any) -> Any:
    """The model with its adapter in its weights, layer by layer in place, so that it answers as the two did.

    A layer of PEFT adds its change to the tensor under it. Where that is both the embeddings and the output layer, the
    change to one would change the other; so they are untied first, and tied again only if they came out the same.

    Args:
        adapted: A `PeftModel`.
    """
    model = adapted.get_base_model()
    untied = _untie(model)
    merged = adapted.merge_and_unload()
    if untied:
        embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        if torch.equal(embeddings.weight, head.weight):
            head.weight = embeddings.weight
            _say_tied(merged, True)
    return merged


def _untie(model: Any) -> bool:
    """Gives the output layer weights of its own if they are the embeddings' and the adapter changes either."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for layer in (embeddings, head)):
        return False
    embeddings, head = _under(embeddings), _under(head)
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    _say_tied(model, False)
    return True


def _under(layer: Any) -> Any:
    """The layer that PEFT's layers are around."""
    while True:
        inner = getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)
        if inner is None:
            return layer
        layer = inner


def _say_tied(model: Any, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
