"""The one place that patches DeepSpeed's classes, by one call: `patch_deepspeed()`, before a process's first engine.

AutoEP, DeepSpeed's expert parallelism, finds a model's MoE blocks and puts a layer of its own in place of each, router
included. That layer loses the router's logits, its z-loss and its biases, and in DeepSpeed 0.19.8 it breaks with the
output recorders of transformers 5.23. DeepSpeed has no option for another layer, hence the patch.

| what the call changes | why |
| --- | --- |
| `auto_ep_presets.registry.PRESET_MODELS` gets a preset for each of our model types | a configuration names it |
| `AutoEP._replace_moe_layer_without_retarget` | with our presets the block stays, its experts alone are replaced |
| `AutoEP.ep_parser` | TRL makes two engines of one model, and the second finds experts spread; PEFT wraps them |
| `DeepSpeedEngine._configure_bf16_optimizer`, `_configure_zero_optimizer` | they want experts' groups even untrained |
| `DeepSpeedEngine._save_moe_checkpoint` | with ZeRO-3 it refuses frozen experts, which it does save |
| `DeepSpeedEngine.load_module_state_dict` | with ZeRO-2 it gives all processes the frozen experts of the first |
| `DeepSpeedEngine.save_checkpoint`, `load_checkpoint` | that of an adapter saves its states alone (`adapter_states`) |

Other engines of the process run as before. One that has MoE layers and trains none of them, as that of a reference or
of an adapter of attention, and one with frozen experts are spared an error.
The patch knows the releases in [`KNOWN_VERSIONS`] and refuses others, in which these names may be gone or mean
something else. To admit a release, read the places above in it, run `tests/moe_backbone/test_expert_parallel.py`
against it with OTPO_UNTESTED_DEEPSPEED=1 in the environment, as `make test-latest` does, and move the bound here and
in `pyproject.toml`.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import nn

from .presets import PRESETS, deepspeed_presets
from .resume import find_adapter_states, has_adapter

KNOWN_VERSIONS = ">=0.19.8,<0.20"
"""DeepSpeed's releases that the patch was tested on, as pip takes them."""

UNTESTED = "OTPO_UNTESTED_DEEPSPEED"
"""A variable of the environment: 1 lets any version of DeepSpeed through, to try the patch on it."""


def require_deepspeed() -> None:
    """Raises an `ImportError` where DeepSpeed is not installed, or not in a version that the patch knows."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("Expert parallelism needs DeepSpeed: `pip install 'otpo[deepspeed]'`.")
    version = importlib.metadata.version("deepspeed")
    if not is_known():
        raise ImportError(
            f"Expert parallelism patches DeepSpeed, and the patch does not know the installed version {version}. "
            f"Install one that it knows: `pip install 'deepspeed{KNOWN_VERSIONS}'`."
        )


def is_known() -> bool:
    """Whether the patch knows the installed release, or is to be tried on it."""
    version = importlib.metadata.version("deepspeed")
    tried = os.environ.get(UNTESTED) == "1"
    return tried or SpecifierSet(KNOWN_VERSIONS).contains(version, prereleases=True)


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
    parse = _parse_plain(AutoEP.ep_parser)
    configure_bf16 = _without_trained_experts(DeepSpeedEngine._configure_bf16_optimizer)
    configure_zero = _without_trained_experts(DeepSpeedEngine._configure_zero_optimizer)
    save_experts = _with_frozen_experts(DeepSpeedEngine._save_moe_checkpoint)
    load_weights = _with_own_experts(DeepSpeedEngine.load_module_state_dict)
    save = _save_adapter(DeepSpeedEngine.save_checkpoint)
    load = _load_adapter(DeepSpeedEngine.load_checkpoint)
    presets = deepspeed_presets()
    AutoEP._replace_moe_layer_without_retarget = replace_block
    AutoEP.ep_parser = parse
    DeepSpeedEngine._configure_bf16_optimizer = configure_bf16
    DeepSpeedEngine._configure_zero_optimizer = configure_zero
    DeepSpeedEngine._save_moe_checkpoint = save_experts
    DeepSpeedEngine.load_module_state_dict = load_weights
    DeepSpeedEngine.save_checkpoint = save
    DeepSpeedEngine.load_checkpoint = load
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
        outermost = getattr(block, spec.experts_name)
        parent, name = innermost(block, spec.experts_name)
        experts = getattr(parent, name)
        layer = ParallelExperts(experts, spec, ep_size, ep_rank)
        sources = ReplacementSourceMap()
        if collect_sources:  # tells an optimizer made beforehand which parameters took the place of which
            sources.discarded = {id(parameter) for parameter in experts.parameters()}
            of_weights = repack_expert_source_params(experts, spec, ep_rank, ep_size)
            for weight, parameters in zip(WEIGHTS, of_weights, strict=True):
                sources.sources[id(getattr(layer.experts, weight))] = list(parameters)
        setattr(parent, name, layer)
        if parent is not block:
            from .adapters import spread_adapters

            for factor in spread_adapters(outermost, ep_size, ep_rank):
                layer.mark(factor)
        return layer, sources

    return replace_layer


def innermost(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    """What holds the experts themselves, and as what: the block, or the innermost of PEFT's wrappers around them."""
    parent = block
    while hasattr(child := getattr(parent, name), "base_layer"):
        parent, name = child, "base_layer"
    return parent, name


def _parse_plain(parse: Any) -> Any:
    from .deepspeed_layer import parallel_experts

    @wraps(parse)
    def ep_parser(self: Any) -> list[Any]:
        # TRL makes an engine of the policy to precompute a reference, and another one to train it.
        if next(parallel_experts(self.model), None):
            return []
        # The parser knows blocks by their names in a model without an adapter, and experts by their tensors.
        adapted = self.model
        if not has_adapter(adapted):
            return parse(self)
        from .adapter_checks import check_adapters

        check_adapters(adapted)  # a trainer's check comes after TRL has made the engine of its reference
        plain = adapted.get_base_model()
        prefix = next(name for name, module in adapted.named_modules() if module is plain)
        self.model = plain
        try:
            with _bare_experts(plain):
                specs = parse(self)
        finally:
            self.model = adapted
        return [replace(spec, moe_module_name=f"{prefix}.{spec.moe_module_name}") for spec in specs]

    return ep_parser


@contextmanager
def _bare_experts(model: nn.Module) -> Iterator[None]:
    """Takes PEFT's wrappers from around the experts for a while."""
    wrapped = [
        (block, block.experts) for block in model.modules() if hasattr(getattr(block, "experts", None), "base_layer")
    ]
    for block, _ in wrapped:
        parent, name = innermost(block, "experts")
        block.experts = getattr(parent, name)
    try:
        yield
    finally:
        for block, outermost in wrapped:
            block.experts = outermost


def _without_trained_experts(configure: Any) -> Any:
    @wraps(configure)
    def configure_optimizer(self: Any, optimizer: Any) -> Any:
        # An engine that has spread experts and trains none is asked for groups of experts all the same. With ZeRO-3
        # it is not, and what it asks for decides where the experts' weights are.
        spread = self.has_moe_layers
        if self.zero_optimization_partition_weights():
            return configure(self, optimizer)
        groups = [] if optimizer is None else optimizer.param_groups
        self.has_moe_layers = spread and any(group.get("moe", False) for group in groups)
        try:
            return configure(self, optimizer)
        finally:
            self.has_moe_layers = spread

    return configure_optimizer


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


def _with_own_experts(load: Any) -> Any:
    from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS

    from .deepspeed_layer import parallel_experts

    @wraps(load)
    def load_module_state_dict(self: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The first process alone writes frozen weights from ZeRO-2 on, its experts among them. Below ZeRO-3 the files
        # of the model and of each expert have all weights, so those are enough, as they are with ZeRO-1.
        spread = next(parallel_experts(self.module), None) is not None
        if spread and not self.zero_optimization_partition_weights():
            checkpoint = {name: value for name, value in checkpoint.items() if name != FROZEN_PARAM_FRAGMENTS}
        return load(self, checkpoint, *args, **kwargs)

    return load_module_state_dict


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


def _trains_adapter(engine: Any) -> bool:
    """Whether an engine has spread experts and PEFT around its model."""
    from .deepspeed_layer import parallel_experts

    return has_adapter(engine.module) and next(parallel_experts(engine.module), None) is not None


def _save_adapter(save: Any) -> Any:
    @wraps(save)
    def save_checkpoint(self: Any, save_dir: str, tag: str | None = None, **options: Any) -> Any:
        if not _trains_adapter(self):
            return save(self, save_dir, tag, **options)
        from .adapter_states import save_states

        tag = tag or f"global_step{self.global_steps}"
        save_states(self, Path(save_dir) / tag)
        return True

    return save_checkpoint


def _load_adapter(load: Any) -> Any:
    @wraps(load)
    def load_checkpoint(self: Any, load_dir: str, tag: str | None = None, **options: Any) -> Any:
        if not _trains_adapter(self):
            return load(self, load_dir, tag, **options)
        from .adapter_states import load_states

        folder = find_adapter_states(load_dir)
        if folder is None:
            return None, {}
        load_states(self, folder)
        return str(folder), {}

    return load_checkpoint
