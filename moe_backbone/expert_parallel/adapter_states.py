"""Adapters of a model whose experts DeepSpeed spreads, as files: a plain PEFT adapter, and the states of a run.

DeepSpeed's own checkpoints would write the model under the adapter, and know no factors of spread experts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from .adapter_files import VALUE, count_of_steps, open_states, write_states
from .adapters import FactorA, FactorB, adapter_sizes
from .deepspeed_layer import ParallelExperts, parallel_experts


def save_plain_adapter(model: Any, folder: str | Path) -> None:
    """Writes adapters as `PeftModel.save_pretrained` writes them for the model with its experts unspread.

    All processes call it.

    Args:
        model: A `PeftModel` whose experts are spread.
        folder: Where to write.
    """
    whole: dict[str, Tensor] = {}
    for name, parameter, factor in _of_adapters(model):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            value = _join(parameter.detach(), factor, _any_layer(model))
        if value is not None:
            whole[name] = value.cpu().clone()
    if dist.get_rank() == 0:
        # The layers hold parts, and PEFT compares neither shapes nor values where it is given a state dict.
        model.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)
    dist.barrier()


def save_states(engine: Any, folder: str | Path) -> None:
    """Writes what a run with adapters resumes from, beside the adapter; all processes call it.

    Args:
        engine: DeepSpeed's, which trains a `PeftModel` whose experts are spread.
        folder: `global_step*` in a checkpoint of the Trainer's.
    """
    optimizer = engine.optimizer
    layer = _any_layer(engine.module)
    _link_states(optimizer)
    keys = _state_keys(optimizer)
    states: dict[str, Tensor] = {}
    for name, parameter, factor in _trained(engine.module):
        parts = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        for key, part in {VALUE: safe_get_full_fp32_param(parameter), **parts}.items():
            whole = _join(part, factor, layer)  # pyright: ignore[reportArgumentType]
            if whole is not None:
                states[f"{name}.{key}"] = whole.cpu().clone()
    if dist.get_rank() == 0:
        rest = {name: getattr(engine, name) for name in _COUNTED}
        rest["steps"] = engine.global_steps - engine.skipped_steps
        rest["loss_scale"] = _numbers(getattr(optimizer, "loss_scaler", None))
        rest["scheduler"] = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
        write_states(folder, states, rest, adapter_sizes(engine.module))
    dist.barrier()


def load_states(engine: Any, folder: str | Path) -> None:
    """Sets adapter and optimizer of an engine that has not trained yet to those of a checkpoint, whatever its layout.

    Args:
        engine: As in [`save_states`]; its processes, size of expert parallelism and ZeRO stage may differ.
        folder: As there.

    Raises:
        ValueError: The checkpoint's adapter is not that of the model.
    """
    model, optimizer = engine.module, engine.optimizer
    ep_size = _any_layer(model).ep_size
    shapes = {name: _whole_shape(parameter, factor, ep_size) for name, parameter, factor in _trained(model)}
    saved = open_states(folder, shapes, adapter_sizes(model))

    # What the engine counts. Another engine than DeepSpeed leaves its own counts, of which the steps are common.
    for name in _COUNTED:
        setattr(engine, name, saved.rest.get(name, saved.rest["steps"] if name == "global_steps" else 0))
    vars(getattr(optimizer, "loss_scaler", None) or _Nothing()).update(saved.rest.get("loss_scale", {}))
    if engine.lr_scheduler is not None and saved.rest.get("scheduler") is not None:
        engine.lr_scheduler.load_state_dict(saved.rest["scheduler"])

    # Of each tensor, the optimizer's states, its float32 values, and the values that the model computes with.
    _make_states(optimizer, saved.keys, saved.rest["steps"])
    layer = _any_layer(model)
    for name, parameter, factor in _trained(model):
        for key in saved.keys:
            part = _part(saved.tensors.get_tensor(f"{name}.{key}"), parameter, factor, layer)
            safe_set_full_optimizer_state(parameter, part, key)
        part = _part(saved.tensors.get_tensor(f"{name}.{VALUE}"), parameter, factor, layer)
        safe_set_full_fp32_param(parameter, part)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(part)
    if hasattr(optimizer, "update_lp_params"):  # without ZeRO-3, whose values the loop has set
        optimizer.update_lp_params()
    elif optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


_COUNTED = ("global_steps", "skipped_steps", "global_samples", "micro_steps")


class _Nothing:
    """An object without attributes."""


def _numbers(scaler: Any) -> dict[str, float | int | bool]:
    return {name: value for name, value in vars(scaler or _Nothing()).items() if isinstance(value, (int, float))}


def _of_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, FactorA | FactorB | None]]:
    """Names and parameters of adapters, and the factor of spread experts that each is, if it is one."""
    factors = {id(module.weight): module for module in model.modules() if isinstance(module, FactorA | FactorB)}
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            yield name, parameter, factors.get(id(parameter))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, FactorA | FactorB | None]]:
    return ((name, parameter, factor) for name, parameter, factor in _of_adapters(model) if parameter.requires_grad)


def _any_layer(model: nn.Module) -> ParallelExperts:
    """A layer of spread experts; all of them have one group."""
    return next(layer for _, layer in parallel_experts(model))


def _join(part: Tensor, factor: FactorA | FactorB | None, layer: ParallelExperts) -> Tensor | None:
    """A whole tensor in the first process; None elsewhere."""
    if factor is None:
        return part if dist.get_rank() == 0 else None
    group: Any = layer.ep_group
    ranks = dist.get_process_group_ranks(group)
    if ranks[0] != 0:
        return None
    parts = [torch.empty_like(part) for _ in ranks] if dist.get_rank() == 0 else None
    dist.gather(part.contiguous(), parts, dst=0, group=group)
    return None if parts is None else factor.join(parts, factor.experts)


def _whole_shape(parameter: Any, factor: FactorA | FactorB | None, ep_size: int) -> tuple[int, ...]:
    """The shape of a parameter in the unspread model; under ZeRO-3 its own is empty while it is not fetched."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return shape if factor is None else factor.whole_shape(shape, ep_size)


def _part(whole: Tensor, parameter: nn.Parameter, factor: FactorA | FactorB | None, layer: ParallelExperts) -> Tensor:
    """This process's part of a whole tensor, where its parameter is."""
    if factor is not None:
        whole = factor.part(whole, layer.ep_size, layer.ep_rank, factor.experts)
    return whole.to(parameter.device)


def _flat(optimizer: Any) -> list[Tensor]:
    """The flat float32 tensors of this process that DeepSpeed's optimizer steps, one for each of its groups."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} is none of ZeRO's optimizers.")


def _state_keys(optimizer: Any) -> list[str]:
    """Names of the optimizer's states that have a number for each number of a tensor."""
    first = _flat(optimizer)[0]
    state = optimizer.optimizer.state[first]
    return sorted(name for name, value in state.items() if isinstance(value, Tensor) and value.shape == first.shape)


def _make_states(optimizer: Any, keys: list[str], steps: int) -> None:
    """Gives an optimizer that has not stepped the states that it has after its first step, of zeros."""
    for flat in _flat(optimizer):
        state = optimizer.optimizer.state[flat]
        state["step"] = count_of_steps(optimizer.optimizer, steps, flat)
        for key in keys:
            state[key] = torch.zeros_like(flat)
    _link_states(optimizer)


def _link_states(optimizer: Any) -> None:
    """Lets each tensor find its states in the flat ones; ZeRO-3 looks them up itself.

    DeepSpeed does so after the first of its groups has stepped, when the others have no states yet (0.19.8).
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
