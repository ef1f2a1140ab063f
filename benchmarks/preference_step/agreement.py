"""Does a contender compute what TRL computes? One batch, same weights: its loss and every parameter's gradient.

Where contenders compute in bfloat16, TRL's step in float32 is what is right, and TRL's own error is the yardstick.
"""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

COUNTED = 1e-3
"""A parameter's gradient is compared if its norm is over this share of the whole gradient's: below is rounding."""


class Gate(NamedTuple):
    """Largest differences, relative, and the least cosine of a parameter's gradient with TRL's."""

    loss: float
    norm: float
    parameter: float
    cosine: float


EXACT = Gate(1e-5, 1e-5, 1e-5, 1 - 1e-9)
"""Of float32 weights, where both sides compute in float32."""
COLUMNS = ("loss", "loss_error", "norm_error", "parameter_error", "cosine", "worst_parameter")


class WrongResult(Exception):
    """Not what TRL computes; the message says what differs."""


class Step(NamedTuple):
    """A step of one batch.

    Attributes:
        loss: Mean over all processes.
        gradients: By the parameters' names, on the CPU; none on other processes than the first.
        seconds: What it took.
    """

    loss: float
    gradients: dict[str, Tensor]
    seconds: float


class GradientKeeper(TrainerCallback):
    """Copies the gradients of a step to the CPU before the optimizer uses them, whatever engine has them."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.trainer: Any = None
        """Set before it trains."""
        self.seconds = 0.0
        """Spent with copying."""
        self.gradients: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """DeepSpeed's engine steps inside its backward pass, so there its own step is what has to be preceded."""
        engine = self.trainer.deepspeed
        if engine is None:
            return
        from deepspeed.utils import safe_get_full_grad

        step = engine.step

        def keep_and_step(*args: Any, **kwargs: Any) -> Any:
            engine.step = step
            self._keep(model, safe_get_full_grad)  # all processes take part in gathering a gradient
            return step(*args, **kwargs)

        engine.step = keep_and_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The gradients of a trainer without DeepSpeed."""
        if self.trainer.deepspeed is None:
            self._keep(model, lambda parameter: parameter.grad)

    def _keep(self, model: Any, gradient_of: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for name, parameter in model.named_parameters():
            gradient = gradient_of(parameter) if parameter.requires_grad else None
            if gradient is not None and self.keeps:
                self.gradients[name.replace("_orig_mod.", "")] = gradient.detach().cpu()
        self.seconds += time.perf_counter() - begun


def differences(found: Step, expected: Step, device: torch.device) -> dict[str, Any]:
    """What `Gate` bounds, by the names of `COLUMNS`.

    Args:
        found: A contender's.
        expected: TRL's, in float32.
        device: Where gradients are compared, one after the other.

    Raises:
        WrongResult: They are not of the same parameters, or not finite.
    """
    strangers = sorted(found.gradients.keys() ^ expected.gradients.keys())
    if strangers:
        raise WrongResult(f"{len(strangers)} parameters have a gradient on one side alone, {strangers[0]} first")
    # Sums in float64 for each parameter: own square, TRL's square, product, square of the difference.
    sums: dict[str, list[float]] = {}
    for name, wanted in expected.gradients.items():
        ours, theirs = (value.to(device).flatten().double() for value in (found.gradients[name], wanted))
        parts = (ours @ ours, theirs @ theirs, ours @ theirs, (ours - theirs).square().sum())
        sums[name] = torch.stack(parts).tolist()
    own, total = (math.sqrt(math.fsum(parts[side] for parts in sums.values())) for side in (0, 1))
    if not (math.isfinite(own) and math.isfinite(found.loss)):
        raise WrongResult(f"the loss is {found.loss}, the gradient's norm {own}")
    counted = {name: parts for name, parts in sums.items() if math.sqrt(parts[1]) > COUNTED * total}
    cosines = {
        name: product / math.sqrt(max(ours, 1e-300) * theirs) for name, (ours, theirs, product, _) in counted.items()
    }
    errors = {name: math.sqrt(difference / theirs) for name, (_, theirs, _, difference) in counted.items()}
    worst = max(errors, key=errors.__getitem__)
    return {
        "loss": found.loss,
        "loss_error": abs(found.loss / expected.loss - 1),
        "norm_error": abs(own / total - 1),
        "parameter_error": errors[worst],
        "cosine": min(cosines.values()),
        "worst_parameter": worst,
    }


def gate_of(trls: dict[str, Any] | None) -> Gate:
    """What is allowed of a contender's differences from a step in float32.

    A row's log-probability is a sum of hundreds of bfloat16 numbers, so a loss of few pairs is off by what chance will
    have it: TRL's by 0.1% to 13% in the cases here. So the loss has a wide bound, and what decides is each parameter's
    gradient: its direction may be as far off as that of TRL's own step in bfloat16.

    Args:
        trls: TRL's [`differences`] in bfloat16; None where the contender computes in float32 too.
    """
    if trls is None:
        return EXACT
    loss, norm = max(5e-2, 3 * trls["loss_error"]), max(5e-2, 3 * trls["norm_error"])
    return Gate(loss, norm, math.inf, min(0.99, trls["cosine"] - 0.01))


def require_agreement(found: dict[str, Any], gate: Gate) -> None:
    """Raises a [`WrongResult`] that names each number of [`differences`] that is outside of the gate."""
    over = [
        f"{what} is off by {found[column]:.1e}"
        for what, column, limit in (
            ("the loss", "loss_error", gate.loss),
            ("the gradient's norm", "norm_error", gate.norm),
            (f"the gradient of {found['worst_parameter']}", "parameter_error", gate.parameter),
        )
        if not found[column] <= limit
    ]
    if not found["cosine"] >= gate.cosine:
        over.append(f"a gradient's cosine is {found['cosine']:.4f} ({found['worst_parameter']})")
    if over:
        raise WrongResult(", ".join(over))
