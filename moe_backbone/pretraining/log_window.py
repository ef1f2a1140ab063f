"""Sums of a training's micro-batches between two entries of its log."""

import time
from typing import Any

from torch import Tensor

from moe_backbone.model.modeling_compass import CompassCausalLMOutput


class LogWindow:
    """Sums over the micro-batches since the last entry of the log, on the device."""

    def __init__(self):
        self.first_step = 0
        self.micro_batches = 0
        self.places = 0
        self.sums: dict[str, Tensor] = {}
        self._began: float | None = None

    def start(self, step: int) -> None:
        """Starts the clock, unless it runs; `step` is the number of steps made so far."""
        if self._began is None:
            self._began, self.first_step = time.perf_counter(), step

    def seconds(self) -> float:
        """Since the clock was started."""
        return time.perf_counter() - (self._began or time.perf_counter())

    def add(self, outputs: CompassCausalLMOutput, inputs: dict[str, Any], top_k: int) -> None:
        """Adds a micro-batch, of whose tokens each takes `top_k` experts a layer."""
        self.micro_batches += 1
        tokens = inputs["router_mask"].sum()
        values = {
            **{name: getattr(outputs, name) for name in ("lm_loss", "mtp_loss", "aux_loss", "z_loss")},
            "load": outputs.expert_load,
            "tokens": tokens,
        }
        self.places += inputs["input_ids"].numel()
        if outputs.expert_load is not None:
            values["asked"] = tokens * top_k * len(outputs.expert_load)
        for name, value in values.items():
            if value is not None:
                value = value.detach()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
