"""Which of PEFT's adapters can be trained where experts are spread; a model may be a real one or on the meta device.

Of experts, factors of their stacked tensors can (`adapters`). Whole copies of experts can't: each process would train
its own, beside the spread ones. Adapters of all else are the same in all processes.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapters import TENSORS, holds_experts

_PEFTS_OWN = ("base_layer", "original_module")  # parts of a name that PEFT's wrappers put there
_REMEDY = (
    "Spread experts are trained by `lora_target_parameters` (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), or "
    "without an adapter"
)


def check_adapters(model: Any) -> None:
    """Raises a `ValueError` where a model has an adapter whose experts can't be spread; the message says what to set.

    Args:
        model: A model, or a `PeftModel` around it, its experts spread or not.
    """
    configs = list((getattr(model, "peft_config", None) or {}).values())
    for config in configs:
        if config.peft_type.value != "LORA":
            raise ValueError(
                f"An adapter of type {config.peft_type.value} can't be trained with spread experts, LoRA can. Set "
                "`use_peft` with the options `lora_*`, or `expert_parallel_size` to 1."
            )
    modules = dict(model.named_modules())
    around: set[str] = set()
    for name, experts in _experts(modules):
        above = [".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1)]
        around |= {path for path in above if _wraps(modules.get(path), experts)}
        for path in above:
            _check_above(configs, modules.get(path), path, name, path in around)
        _check_experts(name, experts, bool(configs))
    for name, module in modules.items():
        if isinstance(module, ParamWrapper) and name not in around:
            _check_elsewhere(configs, module, name)


def _experts(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of experts without PEFT's wrappers, by what they hold or by their usual name."""
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        parts = [part for part in name.split(".") if part not in _PEFTS_OWN]
        if holds_experts(module) or parts[-1] == "experts":
            yield name, module


def _wraps(module: Any, experts: nn.Module) -> bool:
    return isinstance(module, ParamWrapper) and module.get_base_layer() is experts


def _check_above(configs: list[Any], module: Any, path: str, experts: str, around: bool) -> None:
    """Raises a `ValueError` where a module that contains experts is one of PEFT's that trains more than factors."""
    if around:
        if module.parameter_name not in TENSORS:
            raise ValueError(
                f"{_named(configs, 'target_parameters', [f'{path}.{module.parameter_name}'])} names "
                f"`{module.parameter_name}` of {path}, and adapters of spread experts are those of "
                f"{' and '.join(TENSORS)}. Name these, or set `expert_parallel_size` to 1."
            )
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"{_named(configs, 'modules_to_save', [path])} names {path}, which holds experts as a whole. {_REMEDY}; "
            "name the parts of it that are no experts, or set `expert_parallel_size` to 1."
        )
    elif isinstance(module, BaseTunerLayer):
        options = ("target_parameters",) if isinstance(module, ParamWrapper) else ("target_modules",)
        raise ValueError(
            f"{_named(configs, options[0], [path])} names {path}, which holds experts ({experts}). {_REMEDY}; or set "
            "`expert_parallel_size` to 1."
        )


def _check_experts(name: str, experts: nn.Module, adapted: bool) -> None:
    """Raises a `ValueError` where experts are quantized, or trained beside their adapter."""
    for tensor in TENSORS:
        weight = getattr(experts, tensor, None)
        if isinstance(weight, nn.Parameter) and (not weight.is_floating_point() or weight.element_size() == 1):
            raise ValueError(
                f"{name} holds {weight.dtype}, and quantized experts can't be spread. Load the model without "
                "`load_in_4bit` and `load_in_8bit`, or set `expert_parallel_size` to 1."
            )
    if not adapted:
        return
    for tensor, parameter in experts.named_parameters():
        if parameter.requires_grad and "lora_" not in tensor:
            raise ValueError(
                f"{name}.{tensor} is trained as a whole (`requires_grad=True`) in a model with an adapter. {_REMEDY}: "
                "freeze it, or set `expert_parallel_size` to 1."
            )


def _check_elsewhere(configs: list[Any], wrapper: Any, name: str) -> None:
    """Raises a `ValueError` for a wrapper of a tensor outside experts: it rewrites the tensor in each forward."""
    path = f"{name}.{wrapper.parameter_name}"
    module = name.rpartition(".")[2]
    by_module = isinstance(wrapper.get_base_layer(), nn.Linear)
    instead = f"Name its module in `lora_target_modules` ({module})" if by_module else "Leave it out"
    raise ValueError(
        f"{_named(configs, 'target_parameters', [path])} names {path}, which is no tensor of experts. Where experts "
        f"are spread, the option takes `mlp.experts.gate_up_proj` and `mlp.experts.down_proj` alone. {instead}, or "
        "set `expert_parallel_size` to 1. If the option was not set, PEFT made it of `lora_target_modules` "
        "(all-linear, or the name of a router): set that to names such as q_proj k_proj v_proj o_proj, and "
        "`lora_target_parameters` to the two above."
    )


def _named(configs: list[Any], option: str, paths: Iterable[str]) -> str:
    """An option and those of its values that name one of the paths by its end; all values where none does."""
    given: list[str] = []
    for config in configs:
        value = getattr(config, option, None) or ()
        given += [value] if isinstance(value, str) else sorted(value)
    plain = [".".join(part for part in path.split(".") if part not in _PEFTS_OWN) for path in paths]
    named = [value for value in given if any(path.endswith(value) for path in plain)] or given
    return f"`lora_{option}={' '.join(named)}`"
