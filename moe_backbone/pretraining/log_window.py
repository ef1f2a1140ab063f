"""Sums of a training's micro-batches between two entries of its log, and the metrics that they make."""

import time
from typing import Any

from torch import Tensor

from moe_backbone.model.modeling_compass import CompassCausalLMOutput
from moe_backbone.model.router import router_health


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

    def metrics(
        self, accelerator: Any, step: int, flops_per_token: float, peak_tflops: float | None
    ) -> dict[str, float]:
        """Metrics of all processes, each of which calls this.

        Args:
            accelerator: The trainer's.
            step: Steps made so far.
            flops_per_token: Operations of the model for a token.
            peak_tflops: Of a device; None logs no MFU.
        """
        steps, processes = step - self.first_step, accelerator.num_processes
        sums: dict[str, Any] = {name: accelerator.reduce(value, "sum") for name, value in self.sums.items()}
        metrics = {}
        for name in ("lm_loss", "mtp_loss"):  # each micro-batch has its share of the step's mean
            if name in sums:
                metrics[name] = float(sums[name]) / steps
        for name in ("aux_loss", "z_loss"):
            if name in sums:
                metrics[name] = float(sums[name]) / (self.micro_batches * processes)
        if "load" in sums:
            health = router_health(sums["load"])
            health["dropped"] = float(sums["asked"] - sums["load"].sum())
            metrics.update({f"router/{name}": value for name, value in health.items()})
        seconds = self.seconds()
        metrics["tokens_per_second"] = float(sums["tokens"]) / seconds
        if peak_tflops is not None:
            flops = flops_per_token * self.places * processes  # each process has as many
            metrics["mfu"] = flops / (seconds * processes * peak_tflops * 1e12)
        return metrics
