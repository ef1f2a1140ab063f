"""The one place that patches DeepSpeed, by one call: `patch_deepspeed()`, before a process makes its first engine.

AutoEP, DeepSpeed's expert parallelism, finds a model's MoE blocks and puts a layer of its own in place of each, router
included. That layer loses the router's logits, its z-loss and its biases, and in DeepSpeed 0.19.8 it breaks with the
output recorders of transformers 5.23. DeepSpeed has no option for another layer, hence the patch.

| what the call changes | why |
| --- | --- |
| `auto_ep_presets.registry.PRESET_MODELS` gets a preset for each of our model types | a configuration names it |
| `AutoEP._replace_moe_layer_without_retarget` | with our presets the block stays, its experts alone are replaced |
| `AutoEP.ep_parser` | TRL makes two engines of one model, and the second finds the experts spread already |
| `DeepSpeedEngine._configure_bf16_optimizer` | an engine that trains nothing is asked for groups of experts |
| `DeepSpeedEngine._save_moe_checkpoint` | with ZeRO-3 it refuses frozen experts, which it does save |

Other engines of the process run as before; the last two changes spare one that has MoE layers and no optimizer, or
frozen experts, an error.
The patch knows the releases in [`KNOWN_VERSIONS`] and refuses others, in which these names may be gone or mean
something else. To admit a release, read the five places above in it, run `tests/moe_backbone/test_expert_parallel.py`
against it with OTPO_UNTESTED_DEEPSPEED=1 in the environment, as `make test-latest` does, and move the bound here and
in `pyproject.toml`.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from packaging.specifiers import SpecifierSet

from .presets import PRESETS, deepspeed_presets

KNOWN_VERSIONS = ">=0.19.8,<0.20"
"""DeepSpeed's releases that the patch was tested on, as pip takes them."""

UNTESTED = "OTPO_UNTESTED_DEEPSPEED"
"""A variable of the environment: 1 lets any version of DeepSpeed through, to try the patch on it."""


def require_deepspeed() -> None:
    """Raises an `ImportError` where DeepSpeed is not installed, or not in a version that the patch knows."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("Expert parallelism needs DeepSpeed: `pip install 'otpo[deepspeed]'`.")
    version = importlib.metadata.version("deepspeed")
    if os.environ.get(UNTESTED) == "1":
        return
    if not SpecifierSet(KNOWN_VERSIONS).contains(version, prereleases=True):
        raise ImportError(
            f"Expert parallelism patches DeepSpeed, and the patch does not know the installed version {version}. "
            f"Install one that it knows: `pip install 'deepspeed{KNOWN_VERSIONS}'`."
        )


def patch_deepspeed() -> None:
    """Makes DeepSpeed put [`deepspeed_layer.ParallelExperts`] in place of experts; a second call changes nothing.

    Raises:
        ImportError: See [`require_deepspeed`].
    """
    require_deepspeed()
    from deepspeed import DeepSpeedEngine
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_presets import registry

    if PRESETS["compass"] in registry.PRESET_MODELS:
        return

    # What stands in the methods' places is made first: if a name is gone from DeepSpeed, nothing is patched.
    replace_block = _replace_experts_alone(AutoEP._replace_moe_layer_without_retarget)
    parse = _spread_once(AutoEP.ep_parser)
    configure = _without_optimizer(DeepSpeedEngine._configure_bf16_optimizer)
    save = _with_frozen_experts(DeepSpeedEngine._save_moe_checkpoint)
    presets = deepspeed_presets()
    AutoEP._replace_moe_layer_without_retarget = replace_block
    AutoEP.ep_parser = parse
    DeepSpeedEngine._configure_bf16_optimizer = configure
    DeepSpeedEngine._save_moe_checkpoint = save
    registry.PRESET_MODELS.update(presets)


def _replace_experts_alone(replace_block: Any) -> Any:
    from deepspeed.module_inject.auto_ep_layer import ReplacementSourceMap
    from deepspeed.moe.ep_repack import repack_expert_source_params

    from .deepspeed_layer import WEIGHTS, ParallelExperts

    @wraps(replace_block)
    def replace_layer(self: Any, spec: Any, ep_size: int, ep_rank: int, collect_sources: bool = False) -> Any:
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


def _spread_once(parse: Any) -> Any:
    from .deepspeed_layer import parallel_experts

    @wraps(parse)
    def ep_parser(self: Any) -> list[Any]:
        # TRL makes an engine of the policy to precompute a reference, and another one to train it.
        return [] if next(parallel_experts(self.model), None) else parse(self)

    return ep_parser


def _without_optimizer(configure: Any) -> Any:
    @wraps(configure)
    def configure_bf16_optimizer(self: Any, optimizer: Any) -> Any:
        # A bfloat16 engine that trains nothing, as a reference's, is asked for groups of experts all the same.
        spread = self.has_moe_layers
        self.has_moe_layers = spread and optimizer is not None
        try:
            return configure(self, optimizer)
        finally:
            self.has_moe_layers = spread

    return configure_bf16_optimizer


def _with_frozen_experts(save: Any) -> Any:
    from deepspeed import DeepSpeedEngine

    from .deepspeed_layer import parallel_experts

    @wraps(save)
    def save_moe_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        frozen = {
            f"{name}.experts.{weight}": parameter
            for name, layer in parallel_experts(self.module)
            for weight, parameter in layer.experts.named_parameters()
            if not parameter.requires_grad
        }
        if not frozen or not self.zero_optimization_partition_weights():
            return save(self, *args, **kwargs)

        # DeepSpeed says that it would not store frozen experts' fragments, and wants the shape of each expert's weight
        # among the optimizer's. It does store them, beside those of all other frozen weights, and it loads them after
        # the optimizer's. So they pass for trained ones while it asks, and for frozen ones while it writes.
        engine_class: Any = DeepSpeedEngine
        fragments_of = self._get_zero_frozen_param_attributes
        names_of = engine_class._autoep_expert_parameter_names

        def attributes(attribute_of: Any) -> Any:
            with _requiring_grad(frozen.values(), False):
                return fragments_of(attribute_of)

        self._get_zero_frozen_param_attributes = attributes
        engine_class._autoep_expert_parameter_names = staticmethod(
            lambda layers, model: names_of(layers, model) - frozen.keys()
        )
        try:
            with _requiring_grad(frozen.values(), True):
                return save(self, *args, **kwargs)
        finally:
            engine_class._autoep_expert_parameter_names = staticmethod(names_of)
            del self._get_zero_frozen_param_attributes

    return save_moe_checkpoint


@contextmanager
def _requiring_grad(parameters: Iterable[Any], required: bool) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)
