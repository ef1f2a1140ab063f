"""Adapters of a model with spread experts, as files: a plain PEFT adapter, and the optimizer's states by name.

An adapter is small, so its optimizer's states are written whole: for each trained tensor its float32 values and the
optimizer's means of gradients, under the tensor's name in the unspread model. They load into any number of
processes, size of expert parallelism and ZeRO stage. The model under the adapter is not written again. DeepSpeed's own
checkpoints would write it, and know no factors of spread experts.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
from deepspeed.utils import safe_set_full_optimizer_state as set_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import FactorA, FactorB
from .deepspeed_layer import ParallelExperts, parallel_experts
from .resume import ADAPTER_STATES_FILE as STATES_FILE

_REST_FILE = "adapter_engine.bin"
_MASTER = "fp32"


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
            value = _join(parameter.detach(), factor, _group_of(model))
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
        folder: Where to write.
    """
    model = engine.module
    states: dict[str, Tensor] = {}
    _link_states(engine.optimizer)
    keys = _state_keys(engine.optimizer)
    for name, parameter, factor in _trained(model):
        for key in (_MASTER, *keys):
            part: Any = (
                safe_get_full_fp32_param(parameter)
                if key == _MASTER
                else safe_get_full_optimizer_state(parameter, key)
            )
            value = _join(part, factor, _group_of(model))
            if value is not None:
                states[f"{name}.{key}"] = value.cpu().clone()
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        scheduler = engine.lr_scheduler
        rest = {
            "steps": engine.global_steps,
            "skipped": engine.skipped_steps,
            "samples": engine.global_samples,
            "micro_steps": engine.micro_steps,
            "loss_scale": _numbers(getattr(engine.optimizer, "loss_scaler", None)),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
        torch.save(rest, Path(folder) / _REST_FILE)
        unfinished = Path(folder) / f".{STATES_FILE}"
        save_file(states, unfinished, metadata={"format": "pt"})
        os.replace(
            unfinished, Path(folder) / STATES_FILE
        )  # a checkpoint that was killed while it was written has none
    dist.barrier()


def load_states(engine: Any, folder: str | Path) -> None:
    """Sets adapter and optimizer of an engine that has not trained yet to those of a checkpoint, whatever its layout.

    Args:
        engine: As in [`save_states`]; its processes, size of expert parallelism and ZeRO stage may differ.
        folder: What was written there.

    Raises:
        ValueError: The checkpoint's adapter is not that of the model.
    """
    model, optimizer = engine.module, engine.optimizer
    rest = torch.load(Path(folder) / _REST_FILE, weights_only=True)
    engine.global_steps, engine.skipped_steps = rest["steps"], rest["skipped"]
    engine.global_samples, engine.micro_steps = rest["samples"], rest["micro_steps"]
    vars(getattr(optimizer, "loss_scaler", None) or _Nothing()).update(rest["loss_scale"])
    if engine.lr_scheduler is not None and rest["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(rest["scheduler"])
    with safe_open(Path(folder) / STATES_FILE, "pt") as file:
        names = set(file.keys())
        keys = sorted({name.rpartition(".")[2] for name in names} - {_MASTER})
        wanted = {f"{name}.{key}" for name, _, _ in _trained(model) for key in (_MASTER, *keys)}
        if names != wanted:
            raise ValueError(
                f"`resume_from_checkpoint={folder}` has an adapter of other tensors than this run's, such as "
                f"{sorted(names ^ wanted)[0]}. Set the options of the adapter (`lora_*`) as they were, or start from "
                f"its weights (`model_name_or_path`)."
            )
        _make_states(optimizer, keys, rest["steps"] - rest["skipped"])
        for name, parameter, factor in _trained(model):
            layer = _group_of(model)
            for key in keys:
                set_state(parameter, _part(file.get_tensor(f"{name}.{key}"), parameter, factor, layer), key)
            value = _part(file.get_tensor(f"{name}.{_MASTER}"), parameter, factor, layer)
            safe_set_full_fp32_param(parameter, value)
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(value)
    if hasattr(optimizer, "update_lp_params"):  # without ZeRO-3, which the loop above has set
        optimizer.update_lp_params()
    elif optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


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


def _group_of(model: nn.Module) -> ParallelExperts:
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
        state["step"] = torch.tensor(float(steps))
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
