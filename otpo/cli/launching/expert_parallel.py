"""`--expert_parallel_size`: what it adds to a training command's options, its trainer and its model."""

import json
import os
from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.trainer import SCHEDULER_NAME

from moe_backbone.expert_parallel.deepspeed_config import expert_parallel_config
from moe_backbone.expert_parallel.deepspeed_trainer import with_expert_parallelism
from moe_backbone.expert_parallel.resume import has_native_states, read_layout
from moe_backbone.expert_parallel.sizes import check_expert_parallel
from moe_backbone.memcpy_experts import NAME
from moe_backbone.model.saved_code import with_saved_code
from otpo.cli.models.compass import require_own_code
from otpo.cli.models.loading import find_origin, load_config
from otpo.cli.options.run_options import EXPERT_PARALLEL_BACKENDS, RunArguments
from otpo.trl_seam import ConvertedWeights, FullySharded

from .engine import requested_engines

_DEFAULT_STAGE = 2


def prepare(values: Mapping[str, Any], environ: MutableMapping[str, str]) -> list[str]:
    """Options to add to a command line that asks for expert parallelism, in a process that a launcher started.

    With `use_cpu`, DeepSpeed is made to run there over gloo, which accelerate alone would leave out without a word.

    Args:
        values: Value of each option.
        environ: The environment of the process; what DeepSpeed on the CPU needs is set in it.

    Raises:
        ValueError: The options contradict each other; the message says what to set.
    """
    # What no backend can do is refused first.
    size, backend = values["expert_parallel_size"], values["expert_parallel_backend"]
    if backend not in EXPERT_PARALLEL_BACKENDS:
        raise ValueError(
            f"`expert_parallel_backend={backend}` is not known. Set one of: {', '.join(EXPERT_PARALLEL_BACKENDS)}."
        )
    for option in ("load_in_4bit", "load_in_8bit"):
        if values.get(option):
            raise ValueError(
                f"`{option}=true` with `expert_parallel_size={size}`: quantized weights can't be spread over "
                f"processes. Leave `{option}` out, or set `expert_parallel_size` to 1."
            )
    if values.get("use_peft"):
        _require_tensors_of_experts(values.get("lora_target_parameters") or [])
    if "WORLD_SIZE" not in environ:
        raise ValueError(
            f"`expert_parallel_size={size}` needs several processes. Add `--num_processes N`, a multiple of {size}."
        )
    if backend == "transformers":
        named = requested_engines(values.get("deepspeed"), values.get("fsdp"), environ)
        if named:
            raise ValueError(
                f"`expert_parallel_backend=transformers` beside {' and '.join(named.values())}: transformers sets up "
                "FSDP2 itself. Leave that out, or set `expert_parallel_backend` to deepspeed."
            )
    if "FSDP" in requested_engines(environ=environ):
        raise ValueError(
            f"`expert_parallel_size={size}` with FSDP of the accelerate configuration. Use zero2, zero3 or ddp; "
            "for FSDP2, name no configuration and set `expert_parallel_backend` to transformers, which brings its own."
        )
    # transformers spreads the experts while it loads the model, so its options need nothing here.
    if backend == "transformers":
        _require_native(values)
        return []

    # DeepSpeed takes a configuration, which replaces the one that the launcher made.
    _take_over(environ)
    base = _deepspeed_options(values.get("deepspeed"), environ)
    stage = int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", _DEFAULT_STAGE))
    config = expert_parallel_config(_model_type(values), size, stage, base=base)
    arguments = ["--deepspeed", json.dumps(config)]
    if values["use_cpu"]:
        _start_gloo(environ)
        arguments += ["--accelerator_config", json.dumps({"use_configured_state": True})]
    return arguments


def trainer_class(plain: type, options: RunArguments, config: Any) -> Any:
    """The class to make the trainer of: one that resumes all its checkpoints, with experts spread or not, saves code.

    Args:
        plain: Of the command.
        options: Of the run.
        config: The model's configuration.

    Raises:
        ValueError: The experts cannot be spread so, or the model has no code of ours; the message says what to set.
    """
    size, of_class = options.expert_parallel_size, plain
    if not issubclass(plain, FullySharded):
        of_class = type(plain.__name__, (FullySharded, ConvertedWeights, plain), {})
    if size != 1:
        text = config.get_text_config()
        experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
        if experts is None:
            raise ValueError(
                f"`expert_parallel_size={size}`: a model of type {config.model_type} has no experts to spread. Leave "
                "the option out."
            )
        check_expert_parallel(size, experts, int(os.environ["WORLD_SIZE"]))
        if options.expert_parallel_backend == "deepspeed":
            of_class = with_expert_parallelism(of_class, size, options.expert_exchange)
        else:
            from moe_backbone.expert_parallel.native_trainer import with_native_checkpoints

            of_class = with_native_checkpoints(of_class)
    if options.save_code:
        require_own_code(config)
        of_class = with_saved_code(of_class)
    return of_class


def check_checkpoint(checkpoint: str, trainer: Any) -> None:
    """Raises a `ValueError` where a trainer would resume the weights of a checkpoint without the optimizer's states.

    Args:
        checkpoint: A folder of transformers' Trainer.
        trainer: Of this run, before it trains.
    """
    if hasattr(trainer, "check_checkpoint"):  # those that train spread experts know their own
        return trainer.check_checkpoint(checkpoint)
    start = f"start from its weights: `model_name_or_path={checkpoint}` without `resume_from_checkpoint`."
    spread = read_layout(Path(checkpoint))
    if spread is not None:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` has the optimizer's states of experts spread over "
            f"{spread.ep_size} process(es), which this run, whose experts are not spread, can't load. Set "
            f"`expert_parallel_size` as it was or to another size above 1, or {start}"
        )
    by_deepspeed = (Path(checkpoint) / "latest").is_file()
    by_fsdp = any(Path(checkpoint).glob("pytorch_model_fsdp*"))
    if not by_deepspeed and not any(Path(checkpoint).glob("optimizer*")):
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` has no optimizer's states (`save_only_model`), so the run "
            f"can't go on as it was. To go on without them, {start}"
        )
    # Without it the Trainer loads no optimizer's states; a schedule of DeepSpeed's own is saved among these.
    if not (Path(checkpoint) / SCHEDULER_NAME).is_file() and not _has_schedule_of_deepspeed(trainer):
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` has no {SCHEDULER_NAME}, so the learning rate would begin anew. "
            f"Resume from another checkpoint, or {start}"
        )
    engines = (
        ("transformers' expert parallelism", has_native_states(checkpoint), False),
        ("DeepSpeed", by_deepspeed, trainer.is_deepspeed_enabled),
        ("FSDP", by_fsdp, trainer.is_fsdp_enabled),
    )
    for engine, saved, running in engines:
        if saved != running:
            has, runs = ("the", "without") if saved else ("no", "under")
            raise ValueError(
                f"`resume_from_checkpoint={checkpoint}` has {has} optimizer's states of {engine}, and this run is "
                f"{runs} it. Run as the checkpoint was saved, or {start}"
            )


def model_options(options: RunArguments) -> dict[str, Any]:
    """Options of `from_pretrained` that the backend needs; none for DeepSpeed, which spreads the experts later."""
    if options.expert_parallel_size == 1 or options.expert_parallel_backend == "deepspeed":
        return {}
    from moe_backbone.expert_parallel.native import native_expert_parallel_options

    return native_expert_parallel_options(options.expert_parallel_size, int(os.environ["WORLD_SIZE"]))


def describe_native(options: RunArguments, model: Any) -> dict[str, str]:
    """A line on how transformers spread the experts; none where DeepSpeed does, or nothing.

    Raises:
        RuntimeError: They were not spread as asked.
    """
    if options.expert_parallel_size == 1 or options.expert_parallel_backend == "deepspeed":
        return {}
    from moe_backbone.expert_parallel.native import require_native_expert_parallelism

    return {"parallel": require_native_expert_parallelism(model, options.expert_parallel_size)}


def _require_tensors_of_experts(targets: list[str]) -> None:
    """Raises a `ValueError` by names alone, before a model is loaded; the trainer's check knows the model."""
    from moe_backbone.expert_parallel.adapters import TENSORS

    others = [target for target in targets if target.rpartition(".")[2] not in TENSORS]
    if others:
        raise ValueError(
            f"`lora_target_parameters={' '.join(others)}` is no tensor of experts. Where these are spread, the option "
            f"takes {' and '.join(f'mlp.experts.{tensor}' for tensor in TENSORS)} alone. Name linear modules of "
            "attention in `lora_target_modules`, leave other tensors out, or set `expert_parallel_size` to 1."
        )


def _require_native(values: Mapping[str, Any]) -> None:
    # The second one saves and loads the optimizer's states of a model that was spread as it was loaded.
    modules = ("transformers.distributed.expert_parallel", "transformers.distributed.checkpoint")
    if None in map(find_spec, modules):
        raise ValueError(
            "`expert_parallel_backend=transformers` needs transformers with `transformers.distributed.checkpoint`, as "
            "5.23 is. Install it, or set `expert_parallel_backend` to deepspeed."
        )
    if values.get("lora_target_parameters") and values["experts_implementation"] not in ("auto", NAME):
        raise ValueError(
            f"`experts_implementation={values['experts_implementation']}` with `lora_target_parameters` and "
            f"`expert_parallel_backend=transformers`: {NAME} alone adds adapters to spread experts. Set "
            "`experts_implementation` to auto."
        )


def _model_type(values: Mapping[str, Any]) -> str:
    name = values["model_name_or_path"]
    if name is None:
        return "compass"
    origin = find_origin("model_name_or_path", name)
    return load_config(origin, bool(values.get("trust_remote_code"))).model_type


def _has_schedule_of_deepspeed(trainer: Any) -> bool:
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin is not None and "scheduler" in plugin.deepspeed_config


def _deepspeed_options(value: Any, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The DeepSpeed configuration that was named, by our option or by the accelerate configuration."""
    value = value or environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not value or isinstance(value, dict):
        return value or None
    try:
        return json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`deepspeed={value}` is not JSON: {error}.") from error


def _take_over(environ: MutableMapping[str, str]) -> None:
    """Makes room for our DeepSpeed configuration where accelerate's has fields of its own: the stage is taken over."""
    for kind in ("OPTIMIZER", "PARAM"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none")
        if device != "none":
            raise ValueError(
                f"`offload_{kind.lower()}_device: {device}` of the accelerate configuration would be lost. Set it in "
                "a DeepSpeed configuration (`deepspeed`), under `zero_optimization`."
            )
    environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # of which accelerate refuses each beside a configuration


def _start_gloo(environ: MutableMapping[str, str]) -> None:
    environ["DS_ACCELERATOR"] = "cpu"
    environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import PartialState

    PartialState(backend="gloo")
