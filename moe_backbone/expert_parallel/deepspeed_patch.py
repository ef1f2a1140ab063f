"""Our layer in DeepSpeed's AutoEP: presets for Compass, Mixtral and Qwen3-MoE, and the one place that patches it.

AutoEP finds a model's MoE blocks and puts a layer of its own in place of each, router included. That layer loses the
router's logits, its z-loss and its biases, and in DeepSpeed 0.19.8 breaks with transformers' output recorders from
5.23 on. With the presets here the block stays and its experts alone are replaced, by [`ParallelExperts`].
"""

from dataclasses import replace
from functools import wraps
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_layer import ReplacementSourceMap
from deepspeed.module_inject.auto_ep_presets import registry
from deepspeed.moe.ep_repack import repack_expert_source_params
from torch import nn

from .deepspeed_config import MODEL_TYPES
from .deepspeed_layer import WEIGHTS, ParallelExperts, parallel_experts

PRESETS = {model_type: f"otpo_{model_type}" for model_type in MODEL_TYPES}
"""Name of the AutoEP preset for each `model_type`. DeepSpeed's own presets keep their names and their layer."""


def register_presets() -> None:
    """Makes the presets known to DeepSpeed; calling it again changes nothing."""
    if PRESETS["compass"] in registry.PRESET_MODELS:
        return
    for model_type, name in PRESETS.items():
        parent = registry.PRESET_MODELS["mixtral" if model_type == "mixtral" else "qwen3_moe"]
        own = ("compass",) if model_type == "compass" else ()
        registry.PRESET_MODELS[name] = replace(
            parent, preset_adapter="default", hf_model_types=own, has_shared_experts=False
        )
    AutoEP._replace_moe_layer_without_retarget = _replace_experts_alone(AutoEP._replace_moe_layer_without_retarget)
    AutoEP.ep_parser = _spread_once(AutoEP.ep_parser)
    DeepSpeedEngine._configure_bf16_optimizer = _without_optimizer(DeepSpeedEngine._configure_bf16_optimizer)


def _spread_once(parse: Any) -> Any:
    @wraps(parse)
    def ep_parser(self: AutoEP) -> list[Any]:
        # TRL makes an engine of the policy to precompute a reference, and another one to train it.
        return [] if next(parallel_experts(self.model), None) else parse(self)

    return ep_parser


def _without_optimizer(configure: Any) -> Any:
    @wraps(configure)
    def configure_bf16_optimizer(self: DeepSpeedEngine, optimizer: Any) -> Any:
        # A bfloat16 engine that trains nothing, as a reference's, is asked for groups of experts all the same.
        spread = self.has_moe_layers
        self.has_moe_layers = spread and optimizer is not None
        try:
            return configure(self, optimizer)
        finally:
            self.has_moe_layers = spread

    return configure_bf16_optimizer


def _replace_experts_alone(replace_block: Any) -> Any:
    @wraps(replace_block)
    def replace_layer(
        self: AutoEP, spec: Any, ep_size: int, ep_rank: int, collect_sources: bool = False
    ) -> tuple[nn.Module, ReplacementSourceMap]:
        if spec.model_family not in PRESETS.values():
            return replace_block(self, spec, ep_size, ep_rank, collect_sources)
        block = self.model.get_submodule(spec.moe_module_name)
        experts = getattr(block, spec.experts_name)
        layer = ParallelExperts(experts, spec, ep_size, ep_rank)
        sources = ReplacementSourceMap()
        if collect_sources:  # tells an optimizer made beforehand which parameters took the place of which
            sources.discarded = {id(parameter) for parameter in experts.parameters()}
            of_weights = repack_expert_source_params(experts, spec, ep_rank, ep_size)
            for name, parameters in zip(WEIGHTS, of_weights, strict=True):
                sources.sources[id(getattr(layer.experts, name))] = list(parameters)
        setattr(block, spec.experts_name, layer)
        return layer, sources

    return replace_layer
