"""Adapters of experts that transformers spreads: trained, saved and resumed by a subclass of a trainer.

transformers loads a model spread already, and PEFT puts its adapters around it whole, in each process. Adapters of all
else stay so: transformers' Trainer averages their gradients (from 5.23 on). Of those of experts, each process keeps
the factors of its own experts, as the part of a DTensor over the processes that share the experts, which is how
transformers' clipping and its Trainer tell them from tensors that all processes hold.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME, Trainer

from moe_backbone.memcpy_experts import ADAPTERS, NAME

from .adapter_files import VALUE, open_states, write_states
from .adapters import FactorA, FactorB, SpreadAdapter, check_adapters, wrappers_around
from .resume import ChecksCheckpoints, Layout, check_adapter_checkpoint, find_adapter_states, write_layout


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


def spread_native_adapters(model: Any, ep_size: int) -> int:
    """Keeps in each process the factors of its own experts; all processes call it, before an optimizer is made.

    Args:
        model: A `PeftModel` around a model whose experts transformers spread.
        ep_size: Processes that share the experts.

    Returns:
        How many modules of experts have an adapter.

    Raises:
        ValueError: See [`adapters.check_adapters`].
    """
    check_adapters(model)
    divisor = model.get_base_model().config.distributed_config.dp_size
    adapted = 0
    for block in list(model.modules()):
        wrappers = [] if isinstance(block, SpreadAdapter) else list(wrappers_around(getattr(block, "experts", block)))
        adapted += bool(wrappers)
        for wrapper in wrappers:
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


@cache
def with_native_adapters(trainer_class: type, ep_size: int) -> type:
    """A subclass of a trainer that trains and saves adapters of experts that transformers spreads.

    Args:
        trainer_class: transformers' Trainer or a subclass.
        ep_size: Processes that share the experts.
    """
    return type(trainer_class.__name__, (NativeAdapterMixin, trainer_class), {"ep_size": ep_size})


class NativeAdapterMixin(ChecksCheckpoints):
    """Spreads an adapter's factors once the trainer has put it on the model, and saves a plain PEFT adapter."""

    ep_size: int

    def __init__(self, *args: Any, **kwargs: Any):
        # transformers' Trainer refuses states of the optimizer for models that it loaded spread. Those of an adapter
        # are written by this class.
        options: Any = next((each for each in (*args, *kwargs.values()) if isinstance(each, TrainingArguments)), None)
        asked = options is not None and options.save_only_model
        if options is not None:
            options.save_only_model = True
        super().__init__(*args, **kwargs)
        if options is not None:
            options.save_only_model = asked
        spread_native_adapters(self.model, self.ep_size)  # pyright: ignore[reportAttributeAccessIssue]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter with the factors of all experts, as `PeftModel.save_pretrained` writes it unspread."""
        trainer: Any = self
        folder = Path(output_dir or trainer.args.output_dir)
        whole = whole_adapter(trainer.model)
        if trainer.args.should_save:
            trainer.model.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
            write_layout(folder, Layout(self.ep_size, trainer.args.world_size, 0))
        dist.barrier()

    def check_checkpoint(self, checkpoint: str | Path) -> None:
        """Raises a `ValueError` where `train` could not resume a checkpoint with all that it holds."""
        check_adapter_checkpoint(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        states: dict[str, Tensor] = {}
        steps = 0
        for name, parameter, factor in _trained(trainer.model):
            state = trainer.optimizer.state[parameter]
            steps = max(steps, int(state.get("step", 0)))
            kept = {key: value for key, value in state.items() if getattr(value, "shape", None) == parameter.shape}
            for key, value in {VALUE: parameter.detach().float(), **kept}.items():
                states[f"{name}.{key}"] = whole_tensor(value, factor).cpu().clone()
        if trainer.args.should_save:
            write_states(Path(output_dir) / f"global_step{trainer.state.global_step}", states, {"steps": steps})
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: the adapter's values stand beside its optimizer's states, which are loaded later."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        trainer: Any = self
        saved = open_states(
            find_adapter_states(checkpoint) or checkpoint, [name for name, *_ in _trained(trainer.model)]
        )
        for name, parameter, factor in _trained(trainer.model):
            state = trainer.optimizer.state[parameter]
            state["step"] = torch.tensor(float(saved.rest["steps"]))
            for key in saved.keys:
                state[key] = _like(parameter, saved.tensors.get_tensor(f"{name}.{key}"), factor)
            with torch.no_grad():
                parameter.copy_(_like(parameter, saved.tensors.get_tensor(f"{name}.{VALUE}"), factor))
        trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


# The Trainer's methods that the mixin has in their places: one that is gone from transformers ends in an error here.
_REPLACED = (
    Trainer._save_optimizer_and_scheduler,
    Trainer._load_from_checkpoint,
    Trainer._load_optimizer_and_scheduler,
)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter, Any]]:
    """Names and parameters that are trained, and the factor of spread experts that each is, if it is one."""
    factors = {id(module.weight): module for module in model.modules() if isinstance(module, _OfDTensor)}
    return [
        (name, parameter, factors.get(id(parameter)))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _like(parameter: Any, whole: Tensor, factor: Any) -> Tensor:
    """A whole tensor as a parameter is, or this process's part of it."""
    if factor is not None:
        mesh = parameter.device_mesh
        whole = factor.part(whole, mesh.size(), mesh.get_local_rank(), factor.experts)
    whole = whole.to(parameter.device, parameter.dtype)
    return DTensor.from_local(whole, parameter.device_mesh, parameter.placements) if factor is not None else whole
