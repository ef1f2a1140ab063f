"""Adapters of experts that transformers spreads, and their files; `native_trainer` trains, saves and resumes them.

transformers loads a model spread already, and PEFT puts its adapters around it whole, in each process. Adapters of all
else stay so: transformers' Trainer averages their gradients (from 5.23 on). Of those of experts, each process keeps
the factors of its own experts, as the part of a DTensor over the processes that share the experts, which is how
transformers' clipping and its Trainer tell them from tensors that all processes hold.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moe_backbone.memcpy_experts import ADAPTERS, NAME

from .adapter_checks import check_adapters
from .adapter_files import VALUE, count_of_steps, open_states, write_states
from .adapters import FactorA, FactorB, SpreadAdapter, adapter_sizes, wrappers_around
from .resume import check_adapter_checkpoint, find_adapter_states


class _OverCopies(torch.autograd.Function):
    """A factor as it is; its gradient is summed over the processes that hold the same experts, and divided."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, group: Any, divisor: int) -> Tensor:
        ctx.group, ctx.divisor = group, divisor
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        if dist.get_world_size(ctx.group) > 1:
            dist.all_reduce(grad, group=ctx.group)
        return grad / ctx.divisor, None, None


class _OfDTensor:
    """What a factor does whose `weight` is a DTensor: the parts of all processes, one after the other.

    The rows of an expert come from all processes that share it, each of which has the loss of its own batch. So the
    gradient of its factor is a sum over batches, and the mean that transformers takes elsewhere is made of it here.
    """

    weight: Any
    copies: Any
    divisor: int

    def local_weight(self) -> Tensor:
        local: Any = _OverCopies.apply(self.weight.to_local(), self.copies, self.divisor)
        return local


class NativeFactorA(_OfDTensor, FactorA):
    """Factor A of experts that transformers spreads."""


class NativeFactorB(_OfDTensor, FactorB):
    """Factor B of experts that transformers spreads."""


class NativeAdapter(SpreadAdapter):
    """A `ParamWrapper` of PEFT's around experts that transformers spreads."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As the experts' forward; they find the adapters in an attribute, since transformers passes on no others.

        Raises:
            RuntimeError: Another experts function than `memcpy` runs, which would leave the adapter out.
        """
        experts: Any = self.get_base_layer()
        running = experts.config._experts_implementation
        if running != NAME:
            raise RuntimeError(
                f"`experts_implementation={running}` knows no adapters of spread experts. Set it to {NAME} or auto."
            )
        before = vars(experts).get(ADAPTERS, ())
        setattr(experts, ADAPTERS, (*before, *self.active()))
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            setattr(experts, ADAPTERS, before)


def spread_native_adapters(model: Any) -> int:
    """Keeps in each process the factors of its own experts; all processes call it, before an optimizer is made.

    Args:
        model: A `PeftModel` around a model whose experts transformers spread.

    Returns:
        How many modules of experts have an adapter.

    Raises:
        ValueError: See [`adapter_checks.check_adapters`].
    """
    check_adapters(model)
    distributed = model.get_base_model().config.distributed_config
    ep_size, divisor = distributed.ep_size, distributed.dp_size
    adapted = 0
    for outermost in list(model.modules()):
        # The check has left none that is not around experts. Those inside one have become spread with it.
        if not isinstance(outermost, ParamWrapper) or isinstance(outermost, SpreadAdapter):
            continue
        adapted += 1
        for wrapper in wrappers_around(outermost):
            mesh = wrapper.get_param().device_mesh
            wrapper.__class__ = NativeAdapter
            wrapper.num_experts //= ep_size
            for layers, factor in ((wrapper.lora_A, NativeFactorA), (wrapper.lora_B, NativeFactorB)):
                for name, layer in list(layers.items()):
                    layers[name] = _spread(layer.weight, factor, wrapper.num_experts, mesh, divisor)
    return adapted


def _spread(whole: Any, of_class: Any, experts: int, mesh: Any, divisor: int) -> Any:
    """The module of a factor of which this process holds a part."""
    with torch.no_grad():
        dist.broadcast(whole.data, src=0)  # random at the start, and maybe not the same in all processes
    over = mesh["ep"]
    part = of_class.part(whole.data, over.size(), over.get_local_rank(), experts)
    weight = nn.Parameter(DTensor.from_local(part, over, [Shard(0)], run_check=False), whole.requires_grad)
    module = of_class(weight, experts)
    module.copies, module.divisor = mesh["efsdp"].get_group(), divisor
    return module


def whole_adapter(model: Any) -> dict[str, Tensor]:
    """The adapters' tensors under the names of the unspread model; all processes call it and all get them."""
    factors = {id(module.weight): module for module in model.modules() if isinstance(module, _OfDTensor)}
    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            whole[name] = whole_tensor(parameter.detach(), factors.get(id(parameter)))
    return whole


def whole_tensor(value: Any, factor: Any) -> Tensor:
    """A tensor of an adapter's, or a state of it, gathered where it is of spread experts."""
    if isinstance(value, DTensor):
        parts = value.full_tensor()
        return parts if factor is None else factor.join(parts.chunk(value.device_mesh.size()), factor.experts)
    return value


def save_native_adapter(model: Any, folder: str | Path) -> None:
    """Writes the adapter with the factors of all experts, as `PeftModel.save_pretrained` writes it unspread.

    All processes call it.

    Args:
        model: As [`spread_native_adapters`] left it.
        folder: Where to write.
    """
    whole = whole_adapter(model)
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)
    dist.barrier()


def save_native_states(model: Any, optimizer: Any, folder: str | Path) -> None:
    """Writes what a run with an adapter resumes from, beside the adapter; all processes call it.

    Args:
        model: As [`spread_native_adapters`] left it.
        optimizer: Of its trained parameters.
        folder: `global_step*` in a checkpoint of the Trainer's.
    """
    states: dict[str, Tensor] = {}
    steps = 0
    for name, parameter, factor in _trained(model):
        state = optimizer.state[parameter]
        steps = max(steps, int(state.get("step", 0)))
        kept = {key: value for key, value in state.items() if getattr(value, "shape", None) == parameter.shape}
        for key, value in {VALUE: parameter.detach().float(), **kept}.items():
            states[f"{name}.{key}"] = whole_tensor(value, factor).cpu().clone()
    if dist.get_rank() == 0:
        write_states(folder, states, {"steps": steps}, adapter_sizes(model))
    dist.barrier()


@torch.no_grad()
def load_native_states(model: Any, optimizer: Any, checkpoint: str | Path) -> None:
    """Sets adapter and optimizer to those of a checkpoint, whatever spread the experts of the run that saved it.

    Args:
        model: As [`spread_native_adapters`] left it.
        optimizer: Of its trained parameters.
        checkpoint: Of the Trainer's.

    Raises:
        ValueError: The checkpoint has no adapter's states, or those of another adapter.
    """
    check_adapter_checkpoint(checkpoint)
    folder: Any = find_adapter_states(checkpoint)
    trained = _trained(model)
    shapes = {name: _whole_shape(parameter, factor) for name, parameter, factor in trained}
    saved = open_states(folder, shapes, adapter_sizes(model))
    for name, parameter, factor in trained:
        state = optimizer.state[parameter]
        state["step"] = count_of_steps(optimizer, saved.rest["steps"], parameter)
        for key in saved.keys:
            state[key] = _like(parameter, saved.tensors.get_tensor(f"{name}.{key}"), factor)
        parameter.copy_(_like(parameter, saved.tensors.get_tensor(f"{name}.{VALUE}"), factor))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter, Any]]:
    """Names and parameters that are trained, and the factor of spread experts that each is, if it is one."""
    factors = {id(module.weight): module for module in model.modules() if isinstance(module, _OfDTensor)}
    return [
        (name, parameter, factors.get(id(parameter)))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _whole_shape(parameter: Any, factor: Any) -> tuple[int, ...]:
    """The shape that [`whole_tensor`] gives a parameter."""
    if factor is None:
        return tuple(parameter.shape)
    return factor.whole_shape(parameter.to_local().shape, parameter.device_mesh.size())


def _like(parameter: Any, whole: Tensor, factor: Any) -> Tensor:
    """A whole tensor as a parameter is, or this process's part of it."""
    if factor is not None:
        mesh = parameter.device_mesh
        whole = factor.part(whole, mesh.size(), mesh.get_local_rank(), factor.experts)
    whole = whole.to(parameter.device, parameter.dtype)
    return DTensor.from_local(whole, parameter.device_mesh, parameter.placements) if factor is not None else whole
