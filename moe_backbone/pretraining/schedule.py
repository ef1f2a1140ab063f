"""Whether a schedule of the learning rate can be made of its arguments, which transformers finds out as it trains."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")


def check_schedule(kind: str, arguments: Mapping[str, Any] | None, learning_rate: float) -> None:
    """Makes a schedule of four steps, the first of them its warm-up, and takes them.

    Args:
        kind: One of transformers' schedules.
        arguments: What it needs beside, such as `{"min_lr": 1e-5}`.
        learning_rate: The peak, >= 0.

    Raises:
        ValueError: The schedule can't be made of these arguments, passes them over, or comes to a rate that is
            negative or not finite.
    """
    if arguments and kind in _WITHOUT_ARGUMENTS:
        raise ValueError(f"{kind} takes no arguments, got {dict(arguments)}")
    for name, value in (arguments or {}).items():  # some schedules make 0 of what is no number
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    try:
        schedule = get_scheduler(kind, optimizer, 1, 4, dict(arguments or {}))
        rates = []
        for _ in range(4 if isinstance(schedule, LambdaLR) else 0):
            optimizer.step()
            schedule.step()
            rates += schedule.get_last_lr()
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    for rate in rates:
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"the learning rate would be {rate}")
