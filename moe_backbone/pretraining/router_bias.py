"""Routers' biases move after each step of the optimizer, by what each expert took in it."""

from typing import Any

from transformers import TrainerCallback

from moe_backbone.model.router import update_router_biases


class RouterBiasUpdate(TrainerCallback):
    """Moves the routers' biases after each step of the optimizer."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the trainer for the load of the step; one that the optimizer left out moves no bias either."""
        load = self.trainer.take_load_of_step()
        if load is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
            update_router_biases(model.model.routers, load, model.config.router_bias_update_speed)
