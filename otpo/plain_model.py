"""A model without what is around it, and where its decoder's layers are."""

from typing import Any

from accelerate.utils import is_peft_model
from torch import nn


def without_adapter(causal_lm: Any) -> Any:
    """The causal language model, of which a PEFT model around it may be given."""
    return causal_lm.get_base_model() if is_peft_model(causal_lm) else causal_lm


def decoder_layers(backbone: Any) -> Any:
    """The `ModuleList` of the decoder's layers, of the text model where several models are inside; None without one.

    Args:
        backbone: A causal language model's `base_model`, whose decoder lists its layers as `layers`.
    """
    layers = getattr(backbone.get_decoder(), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None
