"""What a training's weights are kept in, and which optimizer trains bfloat16 ones without losing small steps."""

from typing import Any, NamedTuple

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from moe_backbone.model.router import CompassRouter

from .master_adamw import MasterAdamW

_PLAIN = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
_ADAMW = ("adamw_torch", "adamw_torch_fused")


class Choice(NamedTuple):
    """An optimizer: the Trainer's `optimizer_cls_and_kwargs`, None for its own, and what a header says of it."""

    made_of: tuple[Any, dict[str, Any]] | None
    told: str


def round_weights(model: Any) -> None:
    """Rounds a float32 model's weights to bfloat16, in place, but for routers and what the model keeps in float32.

    Logits of routers are computed in float32, and a rounded weight would send tokens elsewhere. Buffers stay as they
    are.

    Args:
        model: A transformers model, whose `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` name parts of
            parameters' names.
    """
    kept = [f"{name}." for name, module in model.named_modules() if isinstance(module, CompassRouter)]
    parts = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    for name, weight in model.named_parameters():
        if not name.startswith(tuple(kept)) and not parts & set(name.split(".")):
            weight.data = weight.data.to(torch.bfloat16)


def choose_optimizer(trainer: Any) -> Choice:
    """The optimizer of a training, [`MasterAdamW`] for AdamW on bfloat16 weights in plain and data-parallel runs.

    Over several micro-batches gradients of bfloat16 weights are summed in float32 (`Tensor.grad_dtype`). DDP reduces
    gradients in the weights' type and takes no other, so it rounds each one once more, and can't sum micro-batches.

    Args:
        trainer: transformers' Trainer before it trains.

    Raises:
        ValueError: Gradients of bfloat16 weights would be summed in bfloat16.
    """
    args, engine = trainer.args, trainer.accelerator.distributed_type
    name = str(getattr(args.optim, "value", args.optim))
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    rounded = [weight for weight in weights if weight.dtype == torch.bfloat16]
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        name = "the caller's"
    inexact = f"{name} on bfloat16 weights with moments in bfloat16: steps below a weight's rounding are lost"
    if not rounded:
        return Choice(None, name)
    if engine not in _PLAIN:
        sharded = engine == DistributedType.DEEPSPEED or args.mixed_precision != "no"
        return Choice(None, f"{name}, of whose weights {engine.value} keeps float32 copies" if sharded else inexact)
    of_dtensors = any(isinstance(weight, DTensor) for weight in weights)
    known = {torch.bfloat16, torch.float32}
    if name not in _ADAMW or of_dtensors or any(weight.dtype not in known for weight in weights):
        return Choice(None, inexact)
    _sum_in_float32(rounded, engine, args.gradient_accumulation_steps)
    _, values = Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    values = {each: value for each, value in values.items() if each != "fused"}
    told = "AdamW on float32 masters of the bfloat16 weights, moments in float32"
    return Choice((MasterAdamW, values), told if engine == DistributedType.NO else f"{told}; DDP reduces in bfloat16")


def _sum_in_float32(weights: list[nn.Parameter], engine: DistributedType, micro_batches: int) -> None:
    if micro_batches == 1:
        return
    if engine != DistributedType.NO:
        raise ValueError(
            f"`gradient_accumulation_steps={micro_batches}` with bfloat16 weights under DDP, which takes no "
            "gradients in float32, so that micro-batches would be summed in bfloat16. Set `dtype` to float32, or "
            "`gradient_accumulation_steps` to 1."
        )
    for weight in weights:
        weight.grad_dtype = torch.float32  # pyright: ignore[reportAttributeAccessIssue]
