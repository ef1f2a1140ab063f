"""What a training's weights are kept in, and which optimizer trains bfloat16 ones without losing small steps."""

from typing import Any, NamedTuple

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.core_model_loading import build_glob_alternation

from moe_backbone.model.router import CompassRouter

from .master_adamw import MasterAdamW

_PLAIN = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU}
ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Names of `optim` that float32 masters are trained by."""
_MASTERED = {torch.bfloat16, torch.float32}
# By names of `optim`: others' kernels want gradients of the weights' type, or read them as such.
_TAKES_FLOAT32 = {"sgd", "adafactor", "rmsprop", "adagrad"}


class Choice(NamedTuple):
    """An optimizer: the Trainer's `optimizer_cls_and_kwargs`, None for its own, and what a header says of it."""

    made_of: tuple[Any, dict[str, Any]] | None
    told: str


def round_weights(model: Any) -> None:
    """Rounds a float32 model's weights to bfloat16, in place, but for routers and what the model keeps in float32.

    Logits of routers are computed in float32, and a rounded weight would send tokens elsewhere. Buffers stay as they
    are.

    Args:
        model: A transformers model, whose `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` are patterns
            that are searched for in parameters' names, as where transformers loads a model.
    """
    kept = [f"{name}." for name, module in model.named_modules() if isinstance(module, CompassRouter)]
    patterns = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    # Compiled by transformers' own function, whose `*` is any text.
    in_float32 = build_glob_alternation(sorted(patterns))[0] if patterns else None
    for name, weight in model.named_parameters():
        if not name.startswith(tuple(kept)) and not (in_float32 and in_float32.search(name)):
            weight.data = weight.data.to(torch.bfloat16)


def choose_optimizer(trainer: Any) -> Choice:
    """The optimizer of a training, [`MasterAdamW`] for AdamW on bfloat16 weights in plain and data-parallel runs.

    Over several micro-batches gradients of bfloat16 weights are summed in float32 (`Tensor.grad_dtype`). DDP reduces
    gradients in the weights' type and takes no other, so it rounds each one once more, and can't sum micro-batches.
    DeepSpeed, and FSDP under mixed precision, train float32 copies of the weights and sum in ways of their own.

    Args:
        trainer: transformers' Trainer before it trains. Its model's `grad_dtype` is set.

    Raises:
        ValueError: Gradients of bfloat16 weights would be summed in bfloat16, or weights are in float16 and nobody
            keeps float32 copies.
    """
    args, engine = trainer.args, trainer.accelerator.distributed_type
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    rounded = [weight for weight in weights if weight.dtype == torch.bfloat16]
    halves = [weight for weight in weights if weight.dtype == torch.float16]
    name, of_masters = _name_optimizer(trainer)
    if not rounded and not halves:
        return Choice(None, name)
    if engine == DistributedType.DEEPSPEED or (engine == DistributedType.FSDP and args.mixed_precision != "no"):
        _set_gradient_type(rounded, torch.bfloat16)
        return Choice(None, f"{name}, of whose weights {engine.value} keeps float32 copies")
    if halves:
        raise float16_refusal()

    sharded = any(isinstance(weight, DTensor) for weight in weights)
    reducer = "transformers' sharding" if sharded else _reducer(engine)
    plain = engine in _PLAIN and not sharded
    chosen = plain and name in ADAMW and all(weight.dtype in _MASTERED for weight in weights)
    _sum_in_float32(
        rounded,
        engine,
        reducer,
        name,
        args.gradient_accumulation_steps,
        takes_float32=of_masters or chosen or name in _TAKES_FLOAT32,
    )
    reduced = "" if engine == DistributedType.NO else f"; {reducer} reduces in bfloat16"
    masters = "on float32 masters of the bfloat16 weights, moments in float32"
    if of_masters:
        return Choice(None, f"{name} {masters}{reduced}")
    if not chosen:
        return Choice(None, f"{name} on bfloat16 weights: steps below a weight's rounding are lost{reduced}")
    _, values = Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    values = {each: value for each, value in values.items() if each != "fused"}
    return Choice((MasterAdamW, values), f"AdamW {masters}{reduced}")


def float16_refusal() -> ValueError:
    """The error of a training whose weights are in float16 and of which nobody keeps float32 copies."""
    return ValueError(
        "Weights in float16 (`dtype=float16`, or `dtype=auto` of such a checkpoint) lose steps below their rounding, "
        "and nobody keeps float32 copies here. Set `dtype` to bfloat16 or float32."
    )


def _name_optimizer(trainer: Any) -> tuple[str, bool]:
    """The optimizer's name for a header, and whether it is a [`MasterAdamW`] that the caller has brought."""
    if trainer.optimizer is not None:
        brought = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    elif trainer.optimizer_cls_and_kwargs is not None:
        brought = trainer.optimizer_cls_and_kwargs[0]
    else:
        return str(getattr(trainer.args.optim, "value", trainer.args.optim)), False
    of_masters = isinstance(brought, type) and issubclass(brought, MasterAdamW)
    return f"the caller's {getattr(brought, '__name__', brought)}", of_masters


def _sum_in_float32(
    weights: list[nn.Parameter],
    engine: DistributedType,
    reducer: str,
    name: str,
    micro_batches: int,
    *,
    takes_float32: bool,
) -> None:
    """Has micro-batches' gradients of bfloat16 weights summed in float32, or refuses; one is left in bfloat16."""
    if micro_batches == 1:
        return _set_gradient_type(weights, torch.bfloat16)
    if engine == DistributedType.NO and takes_float32:
        return _set_gradient_type(weights, torch.float32)
    others = ["`dtype` to float32"]
    if engine != DistributedType.NO:
        why = f"under {reducer}"
        others += ["`bf16` to true"] if engine == DistributedType.FSDP else []
    else:
        why = f"and {name if name.startswith('the caller') else f'`optim={name}`'}"
        others += [] if name in ADAMW else ["`optim` to adamw_torch_fused"]
    raise ValueError(
        f"`gradient_accumulation_steps={micro_batches}` with bfloat16 weights {why}, which takes no gradients in "
        f"float32, so that micro-batches would be summed in bfloat16. Set {', '.join(others)}, or "
        "`gradient_accumulation_steps` to 1."
    )


def _set_gradient_type(weights: list[nn.Parameter], dtype: torch.dtype) -> None:
    """Sets `grad_dtype` both ways, since an earlier training of the same model may have left another."""
    for weight in weights:
        kept: Any = weight
        if kept.grad_dtype != dtype:
            grad, weight.grad = weight.grad, None  # torch refuses another type beside a gradient
            kept.grad_dtype = dtype
            weight.grad = None if grad is None else grad.to(dtype)


def _reducer(engine: DistributedType) -> str:
    return "DDP" if engine in _PLAIN else engine.value
