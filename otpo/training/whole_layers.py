"""Decoder layers that ZeRO-3 gathers whole, in place of each small module in them."""

from typing import Any

from otpo.plain_model import decoder_layers, has_experts, without_adapter


def gather_whole_layers(causal_lm: Any, *, trained: bool) -> int:
    """Lets ZeRO-3 gather a decoder layer at once: a step on ragged rows waits for the host, which runs its hooks.

    DeepSpeed puts hooks around every module, a dozen in a layer, and calls layers whose hooks stop at them leaves. Its
    hook of a leaf's gradients comes too early where the layer's input needs none, so a model that is trained in part
    keeps all hooks. So do layers of experts: spread ones are reduced otherwise.

    Args:
        causal_lm: A model, or a PEFT model around it, before DeepSpeed's engine is made; without ZeRO-3 nothing looks
            at what is set here.
        trained: Whether it is the policy.

    Returns:
        How many layers are leaves.
    """
    layers = decoder_layers(without_adapter(causal_lm).base_model)
    if not layers or has_experts(causal_lm) or (trained and is_frozen_in_part(causal_lm)):
        return 0
    from deepspeed.utils import set_z3_leaf_modules

    return len(set_z3_leaf_modules(causal_lm, list({type(layer) for layer in layers})))


def require_trained_leaves(causal_lm: Any) -> None:
    """Refuses parameters that were frozen after [`gather_whole_layers`].

    Raises:
        ValueError: Some are; gradients would be wrong without a word.
    """
    from deepspeed.utils import z3_leaf_module

    layers = decoder_layers(without_adapter(causal_lm).base_model) or ()
    if any(z3_leaf_module(layer) for layer in layers) and is_frozen_in_part(causal_lm):
        name = next(name for name, parameter in causal_lm.named_parameters() if not parameter.requires_grad)
        raise ValueError(
            f"`{name}` was frozen after the trainer was made, which had ZeRO-3 gather whole layers of a model that is "
            "trained in full. Freeze parameters before you make the trainer."
        )


def is_frozen_in_part(causal_lm: Any) -> bool:
    """Whether any parameter is not trained."""
    return not all(parameter.requires_grad for parameter in causal_lm.parameters())
