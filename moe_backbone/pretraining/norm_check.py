"""Stops a training whose gradient is not finite, without a wait for the device in any step."""

import math
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from transformers import TrainerCallback

from moe_backbone.expert_parallel.deepspeed_config import count_without_waiting
from moe_backbone.expert_parallel.deepspeed_norms import spare_waits


class NormCheck:
    """Reads each step's gradient norm when the next one has been queued, so that the device never runs dry.

    On the CPU, or where an engine has read the norm already, a number is looked at at once.
    """

    def __init__(self) -> None:
        self._copied: tuple[Tensor, torch.cuda.Event, int, bool] | None = None

    def add(self, norm: Any, steps: int, *, left_out: bool = False, to_come: bool = True) -> None:
        """Takes a step's norm and looks at the one before.

        Args:
            norm: A scalar tensor, a number, or None where nothing was computed.
            steps: How many steps were made before.
            left_out: Whether the optimizer leaves out a step whose norm is not finite.
            to_come: Whether this step's update is still to be made.

        Raises:
            FloatingPointError: This norm, or the one before, is not finite.
        """
        self.read()
        if isinstance(norm, Tensor) and norm.device.type == "cuda":
            copied = norm.detach().to("cpu", torch.float32, non_blocking=True)  # pinned memory
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(norm.device))
            self._copied = copied, event, steps, left_out
        elif norm is not None:
            _require_finite(float(norm), steps, left_out=left_out or to_come)

    def add_of_deepspeed(self, engine: Any, norm: Any, steps: int) -> None:
        """Takes the norm of a step that DeepSpeed's engine has made or left out, within the backward pass.

        Under fp16 nothing is looked at, since its scale skips steps as a scaler does.

        Args:
            engine: DeepSpeed's; its own word tells a step that was left out, after which stage 3 keeps the norm of the
                step before.
            norm: As in [`NormCheck.add`].
            steps: See there.

        Raises:
            FloatingPointError: This norm, or the one before, is not finite.
            ValueError: The engine computes no norm, and does not look at each gradient either.
        """
        if engine.fp16_enabled():
            return
        left_out = bool(getattr(engine.optimizer, "overflow", False))
        if norm is None and not getattr(engine.optimizer, "check_grad_overflow", False):
            raise ValueError(
                "DeepSpeed computes no norm of the gradient here, so nothing would stop where it is not finite. Leave "
                "`zero_optimization.compute_grad_norm` out, and set `zero_optimization.stage` to at least 1."
            )
        self.add(math.inf if left_out else norm, steps, left_out=left_out, to_come=False)

    def read(self) -> None:
        """Looks at the last norm that was added; whoever shows or saves something calls it first.

        Raises:
            FloatingPointError: It is not finite.
        """
        if self._copied is None:
            return
        (copied, event, steps, left_out), self._copied = self._copied, None
        event.synchronize()
        _require_finite(float(copied), steps, left_out=left_out)


def spare_looks(accelerator: Any) -> None:
    """Keeps DeepSpeed from two things that the host waits for, unless its configuration asks for them.

    It looks at each bfloat16 gradient by itself before each step (`bf16.check_grad_overflow`). A run with a
    [`NormCheck`] stops at the norm that such a gradient makes; who has no norms computed
    (`zero_optimization.compute_grad_norm`) keeps the look. And it waits for the device before each micro-batch and
    after each step, to know how many samples it trains in a second (`timers.throughput.synchronized`).

    Args:
        accelerator: accelerate's, before it makes the engine.
    """
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    config: Any = {} if plugin is None else plugin.deepspeed_config
    has_norms = config.get("zero_optimization", {}).get("compute_grad_norm", True)
    if isinstance(config.get("bf16"), dict) and has_norms:
        config["bf16"].setdefault("check_grad_overflow", False)
    if plugin is not None:
        count_without_waiting(config)


class SpareWaits(TrainerCallback):
    """Has DeepSpeed's engine compute norms without a wait, see [`moe_backbone.expert_parallel.deepspeed_norms`].

    Args:
        trainer: transformers' Trainer or a subclass; of other engines nothing is changed.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Changes the engine, which is made by now."""
        if self._trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            spare_waits(self._trainer.model_wrapped.optimizer)


def _require_finite(norm: float, steps: int, *, left_out: bool) -> None:
    if not math.isfinite(norm):
        update = "No update was made from it" if left_out else "The weights in memory have been updated from it"
        raise FloatingPointError(
            f"The gradient's norm is {norm} after {steps} step(s). {update} and nothing was saved. Resume from the "
            "last checkpoint with a lower `learning_rate`."
        )
