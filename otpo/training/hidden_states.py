"""The hidden states that weights are made of, taken on their way through the model by a hook on one module.

`output_hidden_states=True` would keep every layer's. Numbered as transformers does: 0 is what enters the first of L
layers, `l` what leaves the l-th, and L, or -1, the last ones after the final norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from otpo.plain_model import decoder_layers, without_adapter


@contextmanager
def captured_states(causal_lm: Any, layer: float | None = -1) -> Iterator[list[Tensor]]:
    """Collects the hidden states `(R, T, D)` of each forward pass inside the block, detached.

    Adapters bypass the causal LM's hooks, never its backbone's, so that is where the hooks go.

    Args:
        causal_lm: The model, or a PEFT model around it, without engines around that.
        layer: See [`check_hidden_layer`].
    """
    backbone = without_adapter(causal_lm).base_model
    captured: list[Tensor] = []
    # Hooks are left out of compiled graphs: a graph would go on filling the list of the step it was traced in.
    entered: Any = entered_layer(causal_lm, layer)
    if entered is None:
        handle = backbone.register_forward_hook(
            torch.compiler.disable(lambda _module, _args, output: captured.append(output.last_hidden_state.detach()))
        )
    else:
        # What leaves a layer enters the next, whatever else layers return. This also holds for the embeddings' output.
        handle = entered.register_forward_pre_hook(
            torch.compiler.disable(lambda _module, args, kwargs: captured.append(_states(args, kwargs).detach())),
            with_kwargs=True,
        )
    try:
        yield captured
    finally:
        handle.remove()


def entered_layer(causal_lm: Any, layer: float | None) -> nn.Module | None:
    """The decoder layer that hidden states enter; None for the last ones, which enter none.

    Args:
        causal_lm: The model, or a PEFT model around it.
        layer: See [`check_hidden_layer`].
    """
    backbone = without_adapter(causal_lm).base_model
    layers, count = decoder_layers(backbone), _count(backbone)
    if layer is None or layer == -1 or layers is None or count is None:
        return None
    index = layer_number(layer, count)
    return None if index == count else layers[index]


def has_listed_layers(causal_lm: Any) -> bool:
    """Whether the model's layers are in a list, so that hidden states before the last can be taken."""
    return _count(without_adapter(causal_lm).base_model) is not None


def layer_number(layer: float, count: int) -> int:
    """The number, from 0 to `count`, of a layer that is named by its number or by its share of the depth."""
    if 0 < layer < 1:  # within the model: neither the embeddings nor what the final norm has scaled
        return min(max(round(layer * count), 1), max(count - 1, 1))
    return int(layer) % (count + 1)


def check_hidden_layer(causal_lm: Any, layer: float | None) -> None:
    """Raises a `ValueError` that names the option unless the model has hidden states of that number.

    Args:
        causal_lm: The model, or a PEFT model around it.
        layer: -1 for the last, after the final norm, which every model has; 0 to L, or from -(L + 1) on, as an index
            of transformers' `hidden_states`, for models whose backbone has its L layers in a list called `layers`.
            Between 0 and 1, that share of L, rounded.
    """
    if layer is None or layer == -1:
        return
    causal_lm = without_adapter(causal_lm)
    count = _count(causal_lm.base_model)
    if count is None:
        raise ValueError(
            f"`hidden_layer={layer:g}` needs a model whose layers are in a list called `layers`, and "
            f"{type(causal_lm).__name__} has none. Set `hidden_layer=-1`."
        )
    check_layer_number(count, layer, type(causal_lm).__name__)


def check_layer_number(count: int, layer: float, model: str) -> None:
    """Raises a `ValueError` that names the option unless a `model` of `count` layers has hidden states `layer`."""
    share = 0 < layer < 1
    if not share and (not -count - 1 <= layer <= count or layer != int(layer)):
        raise ValueError(
            f"`hidden_layer` must be a whole number within [{-count - 1}, {count}] for {model}, which has {count} "
            f"layers, or a share of its depth between 0 and 1, got {layer:g}."
        )


def check_layer_before_loading(model: Any, args: Any) -> None:
    """Refuses a `hidden_layer` that the model does not have, before the model and the data are loaded.

    Args:
        model: The model, or the name that it is loaded by.
        args: The trainer's options.

    Raises:
        ValueError: There is no such layer.
    """
    if args.hidden_layer == -1:
        return
    if not isinstance(model, str):
        check_hidden_layer(model, args.hidden_layer)
        return
    loading: Any = args.model_init_kwargs or {}
    trusted = loading.get("trust_remote_code", args.trust_remote_code)
    config = AutoConfig.from_pretrained(model, revision=loading.get("revision"), trust_remote_code=trusted)
    check_layer_number(config.get_text_config().num_hidden_layers, args.hidden_layer, type(config).__name__)


def require_decoder_alone(model: Any) -> None:
    """Raises a `ValueError` for an encoder-decoder model: rows are of a prompt and its answer, read by one decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # engines around a model have none
        raise ValueError(
            f"`model` is an encoder-decoder, {type(model).__name__}, which does not read a prompt and its answer as "
            "one row. Take a causal language model."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _count(backbone: Any) -> int | None:
    """L; a list may go on with layers that the backbone does not run, such as those of multi-token prediction."""
    listed = decoder_layers(backbone) is not None
    return backbone.config.get_text_config().num_hidden_layers if listed else None


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
