"""Subclasses of transformers' and TRL's trainers that train, save and resume models with spread experts."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from .adapter_files import check_optimizer
from .capacity import AgreedCapacity, host_group
from .deepspeed_config import require_expert_parallelism
from .deepspeed_norms import spare_waits
from .deepspeed_patch import patch_deepspeed
from .gather import gather_pays
from .resume import (
    Layout,
    StateLast,
    check_adapter_checkpoint,
    check_layout,
    fit_checkpoint,
    follow_schedule,
    has_adapter,
    restore_steps,
    restore_untrained,
    write_layout,
)

EXCHANGES = ("auto", "gather", "all_to_all")
"""How rows reach spread experts. `auto` gathers where batches have one size and it moves no more bytes."""


@cache
def with_expert_parallelism(trainer_class: type, ep_size: int, exchange: str = "auto") -> type:
    """A subclass of a trainer that trains, checks and saves models with spread experts.

    A trainer of it patches DeepSpeed when it is made.

    Args:
        trainer_class: transformers' Trainer or a subclass.
        ep_size: Processes that share the experts. `args.deepspeed` must come from
            [`moe_backbone.expert_parallel.deepspeed_config.expert_parallel_config`] with the same size.
        exchange: One of [`EXCHANGES`], how rows reach their experts. A trainer that has `tokens_in_batch` gathers so
            many in training; with another one, the processes agree on the number before each pass, of a reference
            (`ref_model`) and in evaluation too.

    Raises:
        ValueError: `exchange` is unknown.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"`expert_exchange={exchange}` is not known. Set one of: {', '.join(EXCHANGES)}.")
    members = {"ep_size": ep_size, "exchange": exchange}
    return type(trainer_class.__name__, (ExpertParallelMixin, trainer_class), members)


class ExpertParallelMixin(StateLast):
    """Marks the experts' parameters for the optimizer, checks the engine before it trains, saves plain checkpoints."""

    ep_size: int
    exchange: str
    converted: Path | None = None
    """The checkpoint of another layout that training resumes."""

    def __init__(self, *args: Any, **kwargs: Any):
        patch_deepspeed()  # before TRL's trainers make the engine of a reference, which they do in their `__init__`
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if has_adapter(trainer.model):
            from .adapter_checks import check_adapters

            check_adapters(trainer.model)
            check_optimizer(trainer.args.optim)
        trainer.add_callback(_RequireExpertParallelism(trainer))

    @property
    def gathers(self) -> bool:
        """Whether training gathers all tokens, see [`moe_backbone.expert_parallel.gather`]."""
        if self.exchange != "auto":
            return self.exchange == "gather"
        config = self.model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue]
        return not self.batches_vary and gather_pays(self.ep_size, config.num_experts_per_tok)

    @property
    def batches_vary(self) -> bool:
        """Whether the trainer knows no largest batch, so that a gather needs one that the processes agree on."""
        return not hasattr(self, "tokens_in_batch")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Makes the trainer's own optimizer, and moves the experts' parameters into groups marked for DeepSpeed."""
        trainer: Any = super()
        optimizer = trainer.create_optimizer(*args, **kwargs)
        separate_experts(optimizer, self.model, self.ep_size)  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as the parent class does; a checkpoint of another layout is converted first."""
        trainer: Any = self
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`: `output_dir={trainer.args.output_dir}` has no checkpoint. Name "
                    "one, or leave the option out."
                )
        if resume_from_checkpoint and has_adapter(trainer.model):
            self.check_checkpoint(str(resume_from_checkpoint))
        elif resume_from_checkpoint:
            config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            frozen = self._has_frozen_experts()
            checkpoint = Path(str(resume_from_checkpoint))
            self.converted = checkpoint if fit_checkpoint(checkpoint, self._layout(), config, frozen) else None
        parent: Any = super()
        return parent.train(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads the schedule as the parent class does; the optimizer's states came with the weights."""
        super()._load_optimizer_and_scheduler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        trainer: Any = self
        if checkpoint is not None and has_adapter(trainer.model):
            follow_schedule(trainer.optimizer, trainer.lr_scheduler)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint in the format that it has: one of another layout is converted, if it was not."""
        trainer: Any = self
        best = trainer.state.best_model_checkpoint
        universal = False
        if not has_adapter(trainer.model):  # whose states load into any layout as they are
            universal = fit_checkpoint(best, self._layout(), {}, self._has_frozen_experts())
        # The engine was told at its start in which format the checkpoint was that it resumed.
        trainer.model_wrapped._config.load_universal_checkpoint = universal
        super()._load_best_model()  # pyright: ignore[reportAttributeAccessIssue]
        if universal:
            restore_untrained(trainer.model_wrapped.module, Path(best))

    def check_checkpoint(self, checkpoint: str | Path) -> None:
        """Raises a `ValueError` where `train` could not resume a checkpoint with all that it holds."""
        trainer: Any = self
        if has_adapter(trainer.model):
            check_adapter_checkpoint(checkpoint)
        else:
            check_layout(checkpoint, self._layout(), self._has_frozen_experts())

    def _has_frozen_experts(self) -> bool:
        """Whether DeepSpeed's checkpoints would have some; those of adapters hold no experts."""
        model = self.model  # pyright: ignore[reportAttributeAccessIssue]
        return not has_adapter(model) and not all(parameter.requires_grad for parameter in _expert_parameters(model))

    def _layout(self) -> Layout:
        accelerator = self.accelerator  # pyright: ignore[reportAttributeAccessIssue]
        return Layout(self.ep_size, accelerator.num_processes, accelerator.state.deepspeed_plugin.zero_stage)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model with all its experts, as `save_plain_model` does, and the checkpoint's layout beside it."""
        from .deepspeed_layer import parallel_experts
        from .save import save_plain_model

        trainer: Any = self
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if next(parallel_experts(model), None) is None:  # before training
            return super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]
        self.check_before_saving()
        folder = Path(output_dir or trainer.args.output_dir)
        if has_adapter(model):
            from .adapter_states import save_plain_adapter

            save_plain_adapter(model, folder)
        else:
            save_plain_model(model, folder)
        if trainer.args.should_save:
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
            write_layout(folder, self._layout())


def separate_experts(optimizer: torch.optim.Optimizer, model: nn.Module, ep_size: int) -> None:
    """Moves the parameters of experts into parameter groups of their own, before any state exists."""
    experts = {id(parameter) for parameter in _expert_parameters(model)}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        rest = {name: value for name, value in group.items() if name != "params"}
        dense = [parameter for parameter in group["params"] if id(parameter) not in experts]
        spread = [parameter for parameter in group["params"] if id(parameter) in experts]
        if dense:
            groups.append({**rest, "params": dense, "name": f"dense_{number}"})
        if spread:
            groups.append({**rest, "params": spread, "name": f"ep_size_{ep_size}", "moe": True})
    optimizer.param_groups[:] = groups


def gather_tokens(model: nn.Module, capacity: int | AgreedCapacity) -> None:
    """Has a model's spread experts gather all tokens.

    Args:
        model: Of DeepSpeed's engine.
        capacity: The most tokens of a batch in any process, the same in all, for training alone; or what the
            processes agree on before each pass, see [`gather_as_agreed`].
    """
    from .deepspeed_layer import parallel_experts

    for _, layer in parallel_experts(model):
        layer.gather(capacity)


def gather_as_agreed(models: Iterable[Any], seconds: float) -> None:
    """Has the spread experts of models gather all tokens, as many as the processes agree on before each pass.

    All processes of the run call it together.

    Args:
        models: Of DeepSpeed's engines, or PEFT's models around them. Those without spread experts are left out.
        seconds: After which a process that waits for others gives up.
    """
    from .deepspeed_layer import parallel_experts

    group = None
    for model in models:
        layer = next((layer for _, layer in parallel_experts(model)), None)
        if layer is None:
            continue
        assert layer.ep_group is not None
        group = group or host_group(layer.ep_group, seconds)
        capacity = AgreedCapacity(group)
        gather_tokens(model, capacity)
        capacity.follow((model.get_base_model() if has_adapter(model) else model).base_model)


def send_rows(models: Iterable[Any]) -> None:
    """Has the spread experts of models get their rows one by one, whatever an earlier training had set."""
    from .deepspeed_layer import parallel_experts

    for model in models:
        layers = [layer for _, layer in parallel_experts(model)]
        for capacity in {layer.agreed for layer in layers if layer.agreed is not None}:
            capacity.leave()
        for layer in layers:
            layer.gathering = layer.agreed = None


def _expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, module in model.named_modules():
        if name.endswith(".experts") and any(hasattr(module, part) for part in ("gate_up_proj", "w1", "base_layer")):
            yield from module.parameters()


class _RequireExpertParallelism(TrainerCallback):
    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        running = require_expert_parallelism(engine, self.trainer.ep_size)
        running += f", {self._set_exchange(engine.module)}"
        spare_waits(engine.optimizer)
        if self.trainer.converted:
            restore_untrained(engine.module, self.trainer.converted)
            if engine.zero_optimization_stage() == 3:
                restore_steps(engine.optimizer, engine.global_steps - engine.skipped_steps)
        if state.is_world_process_zero:
            print(f"{'parallel':<10} {running}")  # noqa: T201 - what runs is said where the command says the rest

    def _set_exchange(self, model: Any) -> str:
        """Has all tokens gathered where the trainer says so; what the header says of it."""
        reference = getattr(self.trainer, "ref_model", None)  # of TRL's trainers
        models = [model] if reference is None else [model, self.trainer.accelerator.unwrap_model(reference)]
        send_rows(models)
        if not self.trainer.gathers:
            return "sending each row to its expert"
        if not self.trainer.batches_vary:
            gather_tokens(model, self.trainer.tokens_in_batch)
            return "gathering all tokens"
        gather_as_agreed(models, self.trainer.args.ddp_timeout)
        return "gathering all tokens, of a number that the processes agree on before each pass"
