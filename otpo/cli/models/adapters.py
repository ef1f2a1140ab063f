"""The adapter that a command's options ask for, and PEFT's refusals of it in terms of those options."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl import ModelConfig, get_peft_config

_NAME = re.compile(r"\w+(\.\w+)*")
_UNMATCHED_MODULES = r"target_modules=.* were set but no module was matched"
_UNMATCHED_PARAMETERS = r"target_parameters=.* were set but no parameter was matched"
_NOTHING = (
    r"Target modules .* not found in the base model",
    r"No modules were targeted for adaptation",
    r"All modules were excluded",
    r"No `target_modules` passed but also no `target_parameters` found",
)
_UNKNOWN_MODEL = r"Please specify `target_modules`"
_NO_COPY = r"Attempted to call copy_\(\) on an invalid python storage"  # of torch, where PEFT copies a sharded module
_UNSUPPORTED = r"Target module (\w+)\(.* is not supported"


def adapter_config(model: ModelConfig) -> Any:
    """PEFT's configuration of the adapter, or None without `use_peft`.

    TRL hands on a list of one name as a string, which PEFT takes for a pattern of whole names: `q_proj` alone would
    match no `model.layers.0.self_attn.q_proj`. So a plain name becomes a list again; `all-linear` and patterns do not.

    Args:
        model: The command's options of the model.
    """
    config: Any = get_peft_config(model)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and _NAME.fullmatch(targets):
        config.target_modules = {targets}
    return config


@contextmanager
def adapter_refusals(model: ModelConfig) -> Iterator[None]:
    """Has PEFT's complaints of the targets of a new adapter name option, value and remedy.

    Raises:
        ValueError: The options name nothing in the model, or what can't be adapted.
    """
    if not model.use_peft:
        yield
        return
    with warnings.catch_warnings():
        # PEFT warns alone where one of two options matches nothing, and the run would train less than was asked for.
        for message in (_UNMATCHED_MODULES, _UNMATCHED_PARAMETERS):
            warnings.filterwarnings("error", message=message, category=RuntimeWarning)
        try:
            yield
        except (ValueError, RuntimeWarning, RuntimeError) as error:
            told = _in_options(str(error), model)
            if told is None:
                raise
            raise ValueError(told) from error


def _in_options(complaint: str, model: ModelConfig) -> str | None:
    """What PEFT complains of, by the options; None for what is not about an adapter's targets."""
    modules, parameters = (
        f"`{option}={_shown(getattr(model, option))}`" for option in ("lora_target_modules", "lora_target_parameters")
    )
    by_end = "Name modules by the ends of their names, such as q_proj k_proj v_proj o_proj, or set all-linear"
    if re.match(_UNMATCHED_PARAMETERS, complaint):
        return (
            f"{parameters} names no tensor of the model. Name tensors by the ends of their names, such as "
            "mlp.experts.gate_up_proj mlp.experts.down_proj, or leave the option out."
        )
    if re.match(_UNMATCHED_MODULES, complaint):
        return f"{modules} names no module of the model. {by_end}, or leave the option out."
    if any(re.match(pattern, complaint) for pattern in _NOTHING):
        saved = model.lora_modules_to_save
        beside = f" beside `lora_modules_to_save={_shown(saved)}`, which trains its modules whole" if saved else ""
        return f"{modules} with {parameters} names nothing in the model to adapt{beside}. {by_end}."
    if re.match(_UNKNOWN_MODEL, complaint):
        return f"`use_peft=true` without `lora_target_modules`: PEFT knows none for this model. {by_end}."
    if re.match(_NO_COPY, complaint) and model.lora_modules_to_save:
        return (
            f"`lora_modules_to_save={_shown(model.lora_modules_to_save)}`: PEFT can't copy modules that transformers "
            "spreads over processes. Leave the option out and adapt them by `lora_target_modules` and "
            "`lora_target_parameters`, or set `expert_parallel_size` to 1."
        )
    unsupported = re.match(_UNSUPPORTED, complaint, re.DOTALL)
    if unsupported:
        return (
            f"{modules} names a {unsupported[1]}, which has no adapter as a module: linear layers and embeddings do. "
            f"{by_end}; tensors of experts go into `lora_target_parameters`."
        )
    return None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(value or []) or "null"
