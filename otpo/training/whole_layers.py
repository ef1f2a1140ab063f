"""Decoder layers that ZeRO-3 gathers whole, in place of each small module in them."""

from collections import Counter
from typing import Any
from weakref import WeakSet

from torch import nn

from otpo.plain_model import decoder_layers, has_experts, without_adapter

# Layers that are leaves by our doing; those that a user has set stay.
_OURS: WeakSet[nn.Module] = WeakSet()


def gather_whole_layers(causal_lm: Any, *, trained: bool) -> int:
    """Lets ZeRO-3 gather a decoder layer at once: a step on ragged rows waits for the host, which runs its hooks.

    DeepSpeed puts hooks around every module, a dozen in a layer, and calls modules whose hooks stop at them leaves.
    It reduces a leaf's gradients where those of its input are there, which comes too early where the input needs none,
    or where another layer has a part in them. So a model keeps all hooks that is trained in part, shares parameters
    between layers, or whose layers are not transformers' own, which take their hidden states by position. So do layers
    of experts: spread ones are reduced otherwise.

    Args:
        causal_lm: A model, or a PEFT model around it, before DeepSpeed's engine is made.
        trained: Whether it is the policy.

    Returns:
        How many layers are leaves by this call.
    """
    from deepspeed.utils import set_z3_leaf_module

    layers: list[nn.Module] = list(decoder_layers(without_adapter(causal_lm).base_model) or ())
    for layer in layers:  # of a trainer before
        if layer in _OURS:
            set_z3_leaf_module(layer, False)
            _OURS.discard(layer)
    keeps_hooks = has_experts(causal_lm) or _share(layers) or (trained and is_frozen_in_part(causal_lm))
    if keeps_hooks or not all(type(layer).__module__.startswith("transformers.models.") for layer in layers):
        return 0
    for layer in layers:
        set_z3_leaf_module(layer, True)
        _OURS.add(layer)
    return len(layers)


def require_trained_leaves(causal_lm: Any) -> None:
    """Refuses parameters that were frozen after [`gather_whole_layers`], which counted on all being trained.

    Raises:
        ValueError: Some are; gradients would be wrong without a word.
    """
    if is_frozen_in_part(causal_lm):
        name = next(name for name, parameter in causal_lm.named_parameters() if not parameter.requires_grad)
        raise ValueError(
            f"`{name}` was frozen after the trainer was made, which had ZeRO-3 gather whole layers of a model that is "
            "trained in full. Freeze parameters before you make the trainer."
        )


def is_frozen_in_part(causal_lm: Any) -> bool:
    """Whether any parameter is not trained."""
    return not all(parameter.requires_grad for parameter in causal_lm.parameters())


def _share(layers: list[nn.Module]) -> bool:
    """Whether a parameter is part of several entries of the list."""
    counts = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    return any(count > 1 for count in counts.values())
