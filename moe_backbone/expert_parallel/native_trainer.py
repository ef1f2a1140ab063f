"""Trainers whose models transformers spreads as it loads them (`native`), with checkpoints that resume.

transformers 5.23 refuses to save an optimizer's states of such models, and can't load weights into them either. It has
the functions for the first, on torch's distributed checkpoints: each process writes its parts, and reads those that it
needs, so that another `ep_size` or number of processes resumes too. The weights of a checkpoint stay plain, with all
experts; `from_pretrained` spreads them once more, and each process copies its parts. Where the model has an adapter, a
checkpoint has that one and its states alone (`native_adapters`); the trainer chooses between the two by `has_adapter`.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME, Trainer

from .adapter_files import check_optimizer
from .resume import (
    OPTIMIZER_FOLDER,
    Layout,
    StateLast,
    check_adapter_checkpoint,
    follow_schedule,
    has_adapter,
    has_native_states,
    write_layout,
)


@cache
def with_native_checkpoints(trainer_class: type) -> type:
    """A subclass of a trainer whose checkpoints of models that transformers spread can be resumed.

    Args:
        trainer_class: transformers' Trainer or a subclass. Its model comes from `from_pretrained` with
            [`moe_backbone.expert_parallel.native.native_expert_parallel_options`]; PEFT's adapter may be around it, or
            be put there by the trainer as it is made.
    """
    return type(trainer_class.__name__, (NativeExpertParallelMixin, trainer_class), {})


class NativeExpertParallelMixin(StateLast):
    """Saves the optimizer's states of a spread model or of an adapter on one, and loads them and the weights."""

    def __init__(self, *args: Any, **kwargs: Any):
        # The constructor refuses to save anything but weights, and reads this option for nothing else.
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        wanted = [options.save_only_model for options in given]
        for options in given:
            options.save_only_model = True
        try:
            super().__init__(*args, **kwargs)
        finally:
            for options, only in zip(given, wanted, strict=True):
                options.save_only_model = only
        trainer: Any = self
        if wanted:  # some trainers make options of their own from those that they were given
            trainer.args.save_only_model = wanted[0]
        model: Any = trainer.model
        if has_adapter(model):
            from .native_adapters import spread_native_adapters

            spread_native_adapters(model)
            check_optimizer(trainer.args.optim)
            if trainer.args.save_only_model and trainer.args.load_best_model_at_end:
                raise ValueError(
                    "`load_best_model_at_end` with `save_only_model`: an adapter on spread experts is loaded from its "
                    "optimizer's states. Leave one of them out."
                )

    def check_checkpoint(self, checkpoint: str | Path) -> None:
        """Raises a `ValueError` where `train` could not resume a checkpoint with all that it holds."""
        if has_adapter(self.model):  # pyright: ignore[reportAttributeAccessIssue]
            check_adapter_checkpoint(checkpoint)
        elif not has_native_states(checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint={checkpoint}` has no optimizer's states of experts that transformers spread "
                f"(a folder `{OPTIMIZER_FOLDER}`). Run as the checkpoint was saved, or start from its weights: "
                f"`model_name_or_path={checkpoint}` without `resume_from_checkpoint`."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model as the parent class does, or a plain PEFT adapter with the factors of all experts."""
        trainer: Any = self
        if not has_adapter(trainer.model):
            return super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]
        from .native_adapters import save_native_adapter

        self.check_before_saving()
        folder = Path(output_dir or trainer.args.output_dir)
        save_native_adapter(trainer.model, folder)
        if trainer.args.should_save:
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
            ep_size = trainer.model.get_base_model().config.distributed_config.ep_size
            write_layout(folder, Layout(ep_size, trainer.args.world_size, 0))
        dist.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        optimizer = _plain(trainer.optimizer)
        if has_adapter(trainer.model):
            from .native_adapters import save_native_states

            save_native_states(trainer.model, optimizer, f"{output_dir}/global_step{trainer.state.global_step}")
        else:
            save_optimizer_distributed(trainer.model, optimizer, f"{output_dir}/{OPTIMIZER_FOLDER}")
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is None:
            return
        self.check_checkpoint(checkpoint)
        if has_adapter(trainer.model):
            _load_adapter(trainer, checkpoint)
        else:
            load_optimizer_distributed(trainer.model, _plain(trainer.optimizer), f"{checkpoint}/{OPTIMIZER_FOLDER}")
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        trainer.lr_scheduler.load_state_dict(_of_groups(schedule, len(trainer.optimizer.param_groups)))
        follow_schedule(trainer.optimizer, trainer.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model  # pyright: ignore[reportAttributeAccessIssue]
        if not has_adapter(model):  # whose values stand beside its optimizer's states, which are loaded later
            load_spread_weights(model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = trainer.state.best_model_checkpoint
        if has_adapter(trainer.model):
            _load_adapter(trainer, best)
        else:
            load_spread_weights(trainer.model, best)


# The Trainer's methods that the mixin has in their places: one that is gone from transformers ends in an error here.
_REPLACED = (
    Trainer._save_optimizer_and_scheduler,
    Trainer._load_from_checkpoint,
    Trainer._load_optimizer_and_scheduler,
    Trainer._load_best_model,
)


def _load_adapter(trainer: Any, checkpoint: str) -> None:
    from .native_adapters import load_native_states

    load_native_states(trainer.model, _plain(trainer.optimizer), checkpoint)


@torch.no_grad()
def load_spread_weights(model: Any, folder: str | Path) -> None:
    """Loads a plain checkpoint into a model that transformers has spread; all processes call it.

    The checkpoint is spread over the same processes first, so each holds its part of the weights twice for a moment.

    Args:
        model: Of [`moe_backbone.expert_parallel.native.native_expert_parallel_options`].
        folder: With safetensors and a configuration, as `save_pretrained` writes them.

    Raises:
        ValueError: The checkpoint lacks weights of the model.
    """
    # FSDP2 makes a class of its own of each model's.
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    loaded, report = kind.from_pretrained(
        folder,
        dtype=model.dtype,
        distributed_config=model.config.distributed_config,
        experts_implementation=model.config._experts_implementation,
        output_loading_info=True,
    )
    weights, own = loaded.state_dict(), model.state_dict()
    missing = sorted(set(report["missing_keys"]) | (own.keys() - weights.keys()))
    if missing:
        raise ValueError(
            f"`resume_from_checkpoint={folder}` lacks weights of the model: {', '.join(missing[:5])}. Resume a "
            "checkpoint that this model saved."
        )
    for name, weight in own.items():
        _local(weight).copy_(_local(weights[name]))


def _of_groups(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """A schedule's state for another number of the optimizer's groups, which differs between sizes.

    The Trainer gives the weights of each mesh of processes groups of their own, with the same learning rate.

    Raises:
        ValueError: The groups had learning rates of their own.
    """
    saved = len(schedule["base_lrs"])
    if saved == groups:
        return schedule
    lists = {name: value for name, value in schedule.items() if isinstance(value, list) and len(value) == saved}
    if any(value != value[:1] * saved for value in lists.values()):
        raise ValueError(
            f"The checkpoint's {saved} groups of weights have learning rates of their own, and this run has {groups} "
            "groups. Set `expert_parallel_size` as it was."
        )
    return {**schedule, **{name: value[:1] * groups for name, value in lists.items()}}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
