"""A model without what is around it, where its decoder's layers are, and what kind they are of."""

import sys
from typing import Any

from torch import nn

# How configurations of Mixture-of-Experts models call their number of experts.
_COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def has_adapter(causal_lm: Any) -> bool:
    """Whether PEFT is around a model. accelerate looks for PEFT's package on the disk each time that it is asked."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(causal_lm, peft.PeftModel)


def without_adapter(causal_lm: Any) -> Any:
    """The causal language model, of which a PEFT model around it may be given."""
    return causal_lm.get_base_model() if has_adapter(causal_lm) else causal_lm


def decoder_layers(backbone: Any) -> Any:
    """The `ModuleList` of the decoder's layers, of the text model where several models are inside; None without one.

    Args:
        backbone: A causal language model's `base_model`, whose decoder lists its layers as `layers`.
    """
    layers = getattr(backbone.get_decoder(), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def has_experts(causal_lm: Any) -> bool:
    """Whether a model is a Mixture of Experts, by a module called `experts` or its configuration."""
    if any(name.rpartition(".")[2] == "experts" for name, _ in causal_lm.named_modules()):
        return True
    config = causal_lm.config.get_text_config()
    counts = [getattr(config, name, None) for name in _COUNTS_OF_EXPERTS]
    return any(isinstance(count, int) and count > 1 for count in counts)
