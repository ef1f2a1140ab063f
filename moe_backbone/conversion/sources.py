"""Which checkpoints of transformers are Compass ones in other names: Qwen3-MoE's and Mixtral's."""

import re
from typing import Any

from transformers import PreTrainedConfig

from moe_backbone.model.config_checks import one_line_refusals
from moe_backbone.model.configuration_compass import CompassConfig

from .targets import SHARED
from .tensors import Tensors

PREFIXES = {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}
"""Prefix of the classes of each `model_type`."""
_COMPASS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def compass_options(config: PreTrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """Options of the Compass model that computes what another model computes.

    Args:
        config: Of the other model.

    Returns:
        Options of `CompassConfig`, and sentences on what is left out.

    Raises:
        ValueError: Compass lacks something of the model. The message names the option.
    """
    kind: Any = config.model_type
    if kind not in PREFIXES:
        raise ValueError(
            f"`model_type={kind}`: Compass models are made of {' and '.join(PREFIXES)} checkpoints. Other models of "
            'transformers run our experts as they are, by `experts_implementation="memcpy"`.'
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "`quantization_config`: quantized weights can't be converted. Name the model in full precision."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None:
        raise ValueError(f"`sliding_window={window}`: Compass attends to whole rows, and would answer otherwise.")
    any_config: Any = config
    options = {name: getattr(config, name) for name in SHARED if name != "head_dim"}
    head_dim = getattr(config, "head_dim", None) or any_config.hidden_size // any_config.num_attention_heads
    options |= {"head_dim": head_dim, "num_experts": any_config.num_local_experts}
    if config.id2label != PreTrainedConfig().id2label:
        options |= {"id2label": config.id2label, "label2id": config.label2id}
    if kind == "mixtral":
        notes = []
        if any_config.router_jitter_noise:
            notes.append(f"`router_jitter_noise={any_config.router_jitter_noise}`: it only teaches")
        width = any_config.intermediate_size
        return options | {"moe_intermediate_size": width, "norm_topk_prob": True, "use_qk_norm": False}, notes

    sparse = any_config.decoder_sparse_step
    if any_config.mlp_only_layers or sparse != 1:
        dense = any_config.mlp_only_layers or [
            layer for layer in range(any_config.num_hidden_layers) if (layer + 1) % sparse
        ]
        raise ValueError(
            f"`mlp_only_layers={any_config.mlp_only_layers}`, `decoder_sparse_step={sparse}`: layer(s) "
            f"{', '.join(map(str, dense))} are dense, and all layers of Compass have experts."
        )
    copied = ("moe_intermediate_size", "norm_topk_prob", "attention_bias")
    return options | {name: getattr(config, name) for name in copied}, []


def compass_tensors(kind: str, tensors: Tensors) -> Tensors:
    """Another model's tensors, experts one by one, under the names of Compass."""
    if kind != "mixtral":
        return tensors
    return {_compass_name(name): tensor for name, tensor in tensors.items()}


def _compass_name(name: str) -> str:
    name = re.sub(r"\.experts\.(\d+)\.(w[123])\.", lambda m: f".experts.{m[1]}.{_COMPASS[m[2]]}.", name)
    return name.replace(".block_sparse_moe.", ".mlp.")


def make_config(options: dict[str, Any]) -> CompassConfig:
    """The configuration; a `ValueError` says which option Compass has another range for."""
    with one_line_refusals():
        return CompassConfig(**options)
