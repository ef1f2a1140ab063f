"""Models as the commands load them: what a name stands for, adapters, references, one device."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from trl import ModelConfig
from trl.trainer.utils import create_model_from_path

from otpo.cli.launching.launch import is_launched

from .merging import load_adapter, merge_adapter

_ADAPTER_CONFIG = "adapter_config.json"


class Origin(NamedTuple):
    """What a model's name stands for.

    Attributes:
        option: The option that gave the name.
        name: The name itself: of a model, or the folder of an adapter.
        base: The model, which is under the adapter where there is one.
        revision: Branch, tag or commit of `base`.
        adapted: Whether `name` is an adapter.
    """

    option: str
    name: str
    base: str
    revision: str
    adapted: bool


def require_model(model: ModelConfig) -> str:
    """The model's name or folder.

    Raises:
        ValueError: None is named, or it is a folder that does not exist.
    """
    name = model.model_name_or_path
    if name is None:
        raise ValueError("No model is named. Set `model_name_or_path` to a name on the Hub or a local folder.")
    require_folder("model_name_or_path", name)
    return name


def require_no_dropout(model: ModelConfig) -> None:
    """Raises a `ValueError` if an adapter of single tensors, such as those of experts, is to have dropout."""
    if model.use_peft and model.lora_target_parameters and model.lora_dropout:
        raise ValueError(
            f"`lora_dropout={model.lora_dropout}` with `lora_target_parameters`, for which PEFT has no dropout. Set "
            "`lora_dropout` to 0."
        )


def require_folder(option: str, name: str) -> None:
    """Raises a `ValueError` if an option's value is a file, or plainly a path where there is no folder."""
    if name.startswith(("/", ".", "~")) and not Path(name).exists():
        raise ValueError(f"`{option}={name}`: there is no such folder.")
    if Path(name).is_file():
        raise ValueError(f"`{option}={name}` is a file. Name the folder of a model or adapter.")


def find_origin(option: str, name: str, revision: str | None = None) -> Origin:
    """The model that a name stands for, and the adapter on it if the name is an adapter's folder.

    Args:
        option: The option that gives the name.
        name: On the Hub, or a folder.
        revision: Of the model; for an adapter's, the one that it was trained on unless this says another.

    Raises:
        ValueError: There is no such folder, or the adapter does not tell its model.
    """
    require_folder(option, name)
    file = Path(name) / _ADAPTER_CONFIG
    if not file.is_file():
        return Origin(option, name, name, revision or "main", adapted=False)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{option}={name}`: {file} can't be read: {error}.") from error
    if not isinstance(base, str):
        raise ValueError(f"`{option}={name}` is an adapter whose {_ADAPTER_CONFIG} names no model. Merge it into one.")
    require_folder(f"{option}={name}` is an adapter, and its `base_model_name_or_path", base)
    if revision in (None, "main"):
        revision = config.get("revision")
    return Origin(option, name, base, revision or "main", adapted=True)


def with_model_options(chosen: Any, model: ModelConfig, revision: str | None = None) -> dict[str, Any]:
    """`model_init_kwargs` as the options of `model` set them; those of `chosen`, a recipe's mapping or None, win."""
    return {
        "revision": revision or model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(chosen if isinstance(chosen, dict) else {}),
    }


def on_one_device(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with the `device_map` of a launched process that is alone on a machine with several accelerators.

    TRL would split the model over all of them. A `device_map` that is there stays.

    Args:
        args: `transformers.TrainingArguments`.
        kwargs: Options of `from_pretrained`.
    """
    alone = is_launched(os.environ) and args.distributed_state.distributed_type.value == "NO"
    if not alone or "device_map" in kwargs or torch.accelerator.device_count() < 2:
        return kwargs
    return kwargs if args.device.type in ("cpu", "mps") else {**kwargs, "device_map": {"": str(args.device)}}


def load_adapted(origin: Origin, args: Any, kwargs: dict[str, Any], quantization: Any = None) -> Any:
    """The model under an adapter with the adapter on it, to be trained on.

    Args:
        origin: The adapter.
        args: `transformers.TrainingArguments`.
        kwargs: Options of `from_pretrained` for the model.
        quantization: Of the model.
    """
    stage = getattr(args.deepspeed_plugin, "zero_stage", None)
    # Under ZeRO-3 all parameters must be of one dtype, as TRL has it for new adapters.
    autocast = stage != 3 or quantization is not None
    model = load_plain(origin, args, kwargs, quantization)
    return load_adapter(model, origin.name, is_trainable=True, autocast_adapter_dtype=autocast)


def load_plain(origin: Origin, args: Any, kwargs: dict[str, Any], quantization: Any = None) -> Any:
    """The model without any adapter, as TRL loads one by its name."""
    options = {"trust_remote_code": args.trust_remote_code, **kwargs}
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.distributed_state.distributed_type.value in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return create_model_from_path(origin.base, **options)


def load_reference(origin: Origin, args: Any, kwargs: dict[str, Any], quantization: Any = None) -> Any:
    """A reference model: loaded as the policy is, its adapter, if it is one's folder, merged into it."""
    kwargs = {**kwargs, "revision": origin.revision}
    if not origin.adapted:
        return load_plain(origin, args, kwargs, quantization)
    return merge_adapter(load_adapted(origin, args, kwargs, quantization))


def require_same_vocabulary(option: str, policy: Any, reference: Any) -> None:
    """Raises a `ValueError` unless two models, by their configurations, know equally many tokens."""
    size, other = (config.get_text_config().vocab_size for config in (policy, reference))
    if other != size:
        raise ValueError(
            f"The reference has {other} tokens in its vocabulary, the model {size}. Set `{option}` to the model that "
            "this one was trained from."
        )


def load_processor(origin: Origin, trust_remote_code: bool) -> Any:
    """The tokenizer or processor: that beside the adapter if one was saved there, else the model's.

    Raises:
        ValueError: There is none; the message names the option of the model.
    """
    return _load_beside(AutoProcessor, origin, trust_remote_code)


def load_tokenizer(origin: Origin, trust_remote_code: bool) -> Any:
    """[`load_processor`] for text alone."""
    return _load_beside(AutoTokenizer, origin, trust_remote_code)


def _load_beside(auto: Any, origin: Origin, trust_remote_code: bool) -> Any:
    own = origin.adapted and (Path(origin.name) / "tokenizer_config.json").is_file()
    name, revision = (origin.name, "main") if own else (origin.base, origin.revision)
    try:
        return auto.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"`{origin.option}={origin.name}`: there is no tokenizer to read, which the model's folder should have "
            f"beside its weights: {error}"
        ) from error


def load_config(origin: Origin, trust_remote_code: bool) -> Any:
    """The configuration of the model; a `ValueError` names the option whose model has none."""
    try:
        return AutoConfig.from_pretrained(origin.base, revision=origin.revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"`{origin.option}={origin.name}`: the model can't be loaded: {error}") from error


def default_device() -> str:
    """The accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type
