"""Which architecture of transformers a Compass model is in other names, its configuration, and its weights there.

| Compass model | architecture | weights |
| --- | --- | --- |
| norms of queries and keys, no shared experts | Qwen3-MoE | the same, under the same names |
| norms of queries and keys, shared experts | Qwen3-Next, full attention in all layers | two gates stand still |
| no norms of queries and keys, no shared experts, `norm_topk_prob` | Mixtral | the same, under other names |

Compass scores experts by a softmax. The architectures whose routers have biases (DeepSeek-V3, GLM-4-MoE and their
kin) score by a sigmoid, so biases have a place nowhere.

A Qwen3-Next layer multiplies the attention's output by `sigmoid(gate)`, and the shared expert's by another, where
Compass has no gate. A gate whose weights are 0 is `sigmoid(0) = 1/2`, and the projection behind it is doubled: in
binary numbers both are exact. Qwen3-Next's norms multiply by `1 + weight`, so Compass's weights are stored less 1.

Shapes: N heads, D width of a head, H hidden size.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig, Qwen3NextConfig

from moe_backbone.model.configuration_compass import CompassConfig

from .tensors import LazyTensor, Tensors

BIAS = "e_score_correction_bias"
SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits", "initializer_range"),
    *("attention_dropout", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Options that have the same name and meaning in Compass and in all that it is converted to and from."""
_TRAINING = ("router_z_loss_coef", "router_bias_update_speed", "mtp_loss_coef", "mtp_detach_trunk", "mtp_detach_head")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_ZERO_CENTRED = re.compile(r".*(layernorm|q_norm|k_norm|(?:^|\.)norm)\.weight")
_FLOAT32_ROUNDING = 2 * 2**-24  # of a subtraction and an addition
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Target(NamedTuple):
    """An architecture.

    Attributes:
        prefix: Of its classes in transformers.
        config: Its configuration's class.
        title: What the command calls it.
        why: A sentence on how the model fits in.
    """

    prefix: str
    config: type[PreTrainedConfig]
    title: str
    why: str


QWEN3_MOE = Target("Qwen3Moe", Qwen3MoeConfig, "Qwen3-MoE", "the same weights under the same names")
QWEN3_NEXT = Target(
    "Qwen3Next",
    Qwen3NextConfig,
    "Qwen3-Next",
    "for the shared experts; all layers have full attention, both gates are fixed at 1/2 and the projections behind "
    "them doubled, and `q_proj` is twice as tall",
)
MIXTRAL = Target(
    "Mixtral", MixtralConfig, "Mixtral", "queries and keys have no norms; the same weights under other names"
)


def choose_target(config: CompassConfig) -> Target:
    """The architecture that computes what a Compass model computes.

    Raises:
        ValueError: There is none, or not one that all who serve it compute alike. The message names the option.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "`quantization_config`: quantized weights can't be converted. Name the model in full precision."
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"`hidden_act={config.hidden_act}`: what serves Qwen3-MoE computes silu, some of it without looking. Such "
            "a model runs with transformers and `import moe_backbone` alone."
        )
    if config.attention_bias:
        raise ValueError(
            "`attention_bias=True`: what serves Qwen3-MoE skips `o_proj`'s bias, or all four, and would answer "
            "otherwise. Such a model runs with transformers and `import moe_backbone` alone."
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"`sliding_window={config.sliding_window}`: Compass attends to whole rows. Take it out of config.json."
        )
    if config.use_qk_norm:
        return QWEN3_NEXT if config.num_shared_experts else QWEN3_MOE
    if config.num_shared_experts:
        raise ValueError(
            f"`num_shared_experts={config.num_shared_experts}` with `use_qk_norm=False`: no architecture of "
            "transformers has shared experts without gates beside attention without norms."
        )
    if not config.norm_topk_prob and config.num_experts_per_tok < config.num_experts:
        raise ValueError(
            "`norm_topk_prob=False` with `use_qk_norm=False`: Mixtral scales the weights of a token's experts to sum "
            "to one."
        )
    return MIXTRAL


def target_options(config: CompassConfig, target: Target) -> dict[str, Any]:
    """Options of the target's configuration."""
    options = {name: getattr(config, name) for name in SHARED}
    if config.id2label != PreTrainedConfig().id2label:
        options |= {"id2label": config.id2label, "label2id": config.label2id}
    if config.problem_type is not None:
        options["problem_type"] = config.problem_type
    width = config.moe_intermediate_size
    if target is MIXTRAL:
        return options | {"intermediate_size": width, "num_local_experts": config.num_experts, "sliding_window": None}
    # No layer is dense, so nothing has `intermediate_size`; the active experts' width is what Qwen3-MoE's own have.
    options |= {
        "moe_intermediate_size": width,
        "intermediate_size": width * config.num_experts_per_tok,
        "num_experts": config.num_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }
    if target is QWEN3_MOE:
        return options | {"use_sliding_window": False, "sliding_window": None}
    options["rope_parameters"] = {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0}
    return options | {
        "partial_rotary_factor": 1.0,
        "full_attention_interval": 1,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "shared_expert_intermediate_size": config.num_shared_experts * width,
    }


def split_off(config: CompassConfig, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Takes off what changes no answer: MTP layers, and biases of routers that choose the same experts without them.

    Args:
        config: Of the model.
        tensors: By name, experts one by one.

    Returns:
        The other tensors, and sentences on what is left out.

    Raises:
        ValueError: The routers' biases choose other experts.
    """
    layers = config.num_hidden_layers
    decoder = {name: it for name, it in tensors.items() if not (m := _LAYER.match(name)) or int(m[1]) < layers}
    notes = []
    if len(decoder) < len(tensors):
        ahead = sorted({int(m[1]) for name in tensors if (m := _LAYER.match(name)) and int(m[1]) >= layers})
        notes.append(
            f"{len(ahead)} MTP layer(s), `model.layers.{ahead[0]}`{' and on' if len(ahead) > 1 else ''}: they teach "
            "and draft, and change no answer"
        )
    biases = {name: it for name, it in decoder.items() if name.endswith(BIAS)}
    if biases:
        uneven = [name for name, it in biases.items() if (bias := it.whole()).ne(bias[:1]).any()]
        if uneven and config.num_experts_per_tok < config.num_experts:
            raise ValueError(
                f"{uneven[0]}{f' and {len(uneven) - 1} more' if len(uneven) > 1 else ''}: routers with biases that "
                "differ (`router_bias_update_speed`) choose other experts than without them, and no architecture of "
                "transformers adds biases to a softmax's scores beside norms of queries and keys. Such a model runs "
                "with transformers and `import moe_backbone` alone."
            )
        notes.append("the routers' biases: they choose the same experts without them")
    notes += [
        f"`{name}={getattr(config, name)}`: it only teaches"
        for name in _TRAINING
        if getattr(config, name) != getattr(CompassConfig, name)
    ]
    return {name: it for name, it in decoder.items() if name not in biases}, notes


def target_tensors(config: CompassConfig, target: Target, tensors: Tensors) -> Tensors:
    """The decoder's tensors under the target's names and in its shapes."""
    if target is QWEN3_MOE:
        return tensors
    if target is MIXTRAL:
        return {_mixtral_name(name): tensor for name, tensor in tensors.items()}
    changed: Tensors = {}
    for name, tensor in tensors.items():
        changed[name] = _in_qwen3_next(name, tensor, config.head_dim)
        if name.endswith("mlp.shared_expert.gate_proj.weight"):
            gate = name.replace("shared_expert.gate_proj", "shared_expert_gate")
            changed[gate] = tensor.map(lambda weight: torch.zeros_like(weight[:1]))
    return changed


def _mixtral_name(name: str) -> str:
    name = re.sub(
        r"\.mlp\.experts\.(\d+)\.(\w+)\.", lambda m: f".block_sparse_moe.experts.{m[1]}.{_MIXTRAL[m[2]]}.", name
    )
    return name.replace(".mlp.", ".block_sparse_moe.")


def _in_qwen3_next(name: str, tensor: LazyTensor, head_dim: int) -> LazyTensor:
    if name.endswith("self_attn.q_proj.weight"):
        return tensor.map(lambda weight: with_still_gates(weight, head_dim))
    if name.endswith(("self_attn.o_proj.weight", "mlp.shared_expert.down_proj.weight")):
        return tensor.map(lambda weight: 2 * weight)
    if _ZERO_CENTRED.fullmatch(name):
        return tensor.map(lambda weight: less_one(name, weight))
    return tensor


def with_still_gates(q_proj: Tensor, head_dim: int) -> Tensor:
    """Query projections `[N D, H]` with a gate of zeros behind each head's, `[2 N D, H]`."""
    heads = q_proj.unflatten(0, (-1, head_dim))
    return torch.cat([heads, torch.zeros_like(heads)], dim=1).flatten(0, 1)


def less_one(name: str, weight: Tensor) -> Tensor:
    """A norm's weights less 1, if adding 1 in float32 gives them back to float32's last bits.

    Raises:
        ValueError: It does not, as it often does not in bfloat16.
    """
    stored = weight - 1
    if not stored.is_meta:
        error = ((1 + stored.float() - weight.float()).abs() / weight.float().abs().clamp(min=1)).max().item()
        if error > _FLOAT32_ROUNDING:
            raise ValueError(
                f"{name}: Qwen3-Next stores a norm's weights less 1, which {weight.dtype} rounds by {error:.1g}: "
                "the model would answer otherwise. Set `--dtype float32`, where it would not."
            )
    return stored
