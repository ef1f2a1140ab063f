"""The type of the weights that `otpo pretrain` trains where the option `dtype` is not set."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from moe_backbone import CompassConfig
from moe_backbone.pretraining.trainer import PretrainingConfig
from moe_backbone.pretraining.weight_types import ADAMW
from otpo.cli.launching.engine import requested_engines
from otpo.cli.running.checkpoints import find_checkpoint
from otpo.cli.running.identity import read_identity

from .options import ModelArguments, PretrainArguments

_TYPES = ("bfloat16", "float16", "float32")
_MASTERS = "AdamW keeps what a float32 weight has more"


class WeightsType(NamedTuple):
    """A type of weights by its name in torch, and why it was taken; None where the option says it."""

    name: str
    why: str | None


def choose_dtype(
    data: PretrainArguments, args: PretrainingConfig, model: ModelArguments, config: CompassConfig
) -> WeightsType:
    """The option `dtype`, or where it is not set what is fast and loses no small steps.

    That is bfloat16 on one GPU, where [`MasterAdamW`](moe_backbone.pretraining.master_adamw.MasterAdamW) trains
    float32 masters: of a new model, and of a checkpoint in bfloat16. Several processes would reduce gradients in
    bfloat16, and engines keep float32 copies of their own, so both get float32 weights. A resumed run has the type
    that it began with.

    Args:
        data: Whether experts are spread, and the model of the stage before.
        args: Device, engine, mixed precision, optimizer, and the checkpoint to resume from.
        model: The option, and the checkpoint that the model is of.
        config: Of the model; its `dtype` is a checkpoint's own.

    Raises:
        ValueError: A checkpoint does not say its type, or can't be gone on from as the run is now.
    """
    if model.dtype is not None:
        return WeightsType(model.dtype, None)
    resumed = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if resumed is not None:
        engines = bool(_engines(args))
        kept = resumed_dtype(resumed, engines=engines)
        if kept == "bfloat16" and args.world_size > 1 and args.gradient_accumulation_steps > 1 and not engines:
            raise ValueError(
                f"`resume_from_checkpoint={resumed}` has bfloat16 weights, whose micro-batches {args.world_size} "
                f"processes would sum in bfloat16. Set `--num_processes 1` or `gradient_accumulation_steps` to 1, or "
                f"start from its weights: `model_name_or_path={resumed}` without `resume_from_checkpoint`."
            )
        return WeightsType(kept, "as in the checkpoint that is resumed")
    if data.previous_stage or model.model_name_or_path:
        own = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
        if own != "bfloat16":
            return WeightsType("float32", f"since the checkpoint {f'is in {own}' if own else 'names no type'}")
    if (reason := _keeps_float32(data, args)) is not None:
        return WeightsType("float32", f"since {reason}")
    return WeightsType("bfloat16", _MASTERS)


def resumed_dtype(checkpoint: str, *, engines: bool) -> str:
    """The option `dtype` of the run that a checkpoint is of.

    The run's own file says it. Where that is missing, an engine's weights were float32 unless they were set, and other
    checkpoints' configurations have the type.

    Args:
        checkpoint: Its folder.
        engines: Whether an engine trains, which may have cast the weights that its configuration names.

    Raises:
        ValueError: Nothing says it.
    """
    recorded = read_identity(checkpoint).get("dtype")
    if recorded is not None:
        return str(recorded)
    if engines:
        return "float32"
    file = Path(checkpoint) / "config.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = str(values.get("dtype", values.get("torch_dtype"))).removeprefix("torch.")
    except (OSError, ValueError, AttributeError):
        name = ""
    if name not in _TYPES:
        raise ValueError(
            f"`resume_from_checkpoint={checkpoint}` does not say the type of its weights. Set `dtype` as it was."
        )
    return name


def _engines(args: PretrainingConfig) -> list[str]:
    return list(requested_engines(args.deepspeed, args.fsdp, os.environ))


def _keeps_float32(data: PretrainArguments, args: PretrainingConfig) -> str | None:
    """Why a run without the option has float32 weights; None where it has not."""
    if args.device.type != "cuda":
        return f"the device is {args.device.type}"
    if args.mixed_precision != "bf16":
        return f"mixed precision is {args.mixed_precision}"
    if data.expert_parallel_size != 1:
        return "experts are spread"
    if engines := _engines(args):
        return f"{engines[0]} keeps float32 copies"
    if args.world_size != 1:
        return f"{args.world_size} processes would reduce gradients in bfloat16"
    name = getattr(args.optim, "value", args.optim)
    if name not in ADAMW:
        return f"`optim={name}` would lose steps below a weight's rounding"
    return None
