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

from .options import ModelArguments, PretrainArguments

_MASTERS = "AdamW keeps what a float32 weight has more"


class WeightsType(NamedTuple):
    """A type of weights by its name in torch, and why it was taken; None where the option says it."""

    name: str
    why: str | None


def choose_dtype(
    data: PretrainArguments, args: PretrainingConfig, model: ModelArguments, config: CompassConfig
) -> WeightsType:
    """The option `dtype`, or where it is not set what trains fastest without losing small steps.

    That is bfloat16 on one GPU, where [`MasterAdamW`](moe_backbone.pretraining.master_adamw.MasterAdamW) trains
    float32 masters: of a new model, and of a checkpoint in bfloat16. Several processes would reduce gradients in
    bfloat16, and engines keep float32 copies of their own, so both get float32 weights. A resumed run has the weights
    of its checkpoint.

    Args:
        data: Whether experts are spread, and the model of the stage before.
        args: Device, engine, mixed precision, optimizer, and the checkpoint to resume from.
        model: The option, and the checkpoint that the model is of.
        config: Of the model; its `dtype` is a checkpoint's own.
    """
    if model.dtype is not None:
        return WeightsType(model.dtype, None)
    resumed = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    kept = None if resumed is None else saved_dtype(Path(resumed))
    if kept is not None:
        return WeightsType(kept, "as in the checkpoint that is resumed")
    if data.previous_stage or model.model_name_or_path:
        own = str(config.dtype or "float32").removeprefix("torch.")
        if own != "bfloat16":
            return WeightsType("float32", f"since the checkpoint is in {own}")
    if (reason := _keeps_float32(data, args)) is not None:
        return WeightsType("float32", f"since {reason}")
    return WeightsType("bfloat16", _MASTERS)


def saved_dtype(checkpoint: Path) -> str | None:
    """The type in which a training's checkpoint has the weights, `"bfloat16"` or `"float32"`; None if it has neither.

    Args:
        checkpoint: Its folder. A checkpoint of an engine may have no configuration.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        return None
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    name = str(values.get("dtype", values.get("torch_dtype"))).removeprefix("torch.")
    return name if name in ("bfloat16", "float32") else None


def _keeps_float32(data: PretrainArguments, args: PretrainingConfig) -> str | None:
    """Why a run without the option has float32 weights; None where it has not."""
    if args.device.type != "cuda":
        return f"the device is {args.device.type}"
    if args.mixed_precision != "bf16":
        return f"mixed precision is {args.mixed_precision}"
    engines = requested_engines(args.deepspeed, args.fsdp, os.environ)
    if engines:
        return f"{next(iter(engines.values()))} keeps float32 copies"
    if data.expert_parallel_size != 1:
        return "experts are spread"
    if args.world_size != 1:
        return f"{args.world_size} processes would reduce gradients in bfloat16"
    name = getattr(args.optim, "value", args.optim)
    if name not in ADAMW:
        return f"`optim={name}` would lose steps below a weight's rounding"
    return None
