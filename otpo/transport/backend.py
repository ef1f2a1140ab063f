"""Which transport solver runs: the Triton kernels where they can, plain torch elsewhere, and never in silence.

This module decides; it imports Triton only when it is about to be used.
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

Solver = Literal["auto", "triton", "torch"]
"""`"triton"`: the kernels of `otpo_kernels`; `"torch"`: float64 in plain torch; `"auto"`: the first where it can."""


def check_solver(solver: str, name: str = "solver") -> None:
    """Raises a `ValueError` that names the option unless `solver` is one of `Solver`."""
    if solver not in get_args(Solver):
        raise ValueError(f"`{name}` must be 'auto', 'triton' or 'torch', got {solver!r}.")


def choose_solver(
    solver: Solver, chosen: Tensor, rejected: Tensor, *, reg: float, reg_m: float, tolerance: float
) -> Literal["triton", "torch"]:
    """The solver that will run for these hidden states `(B, M, D)` and `(B, N, D)` and settings.

    `"auto"` takes the kernels for states on an accelerator. Where something else stands in their way it warns
    once, with the reason, and takes torch.

    Raises:
        ValueError: `solver` is unknown, or it is `"triton"` and the kernels cannot run.
    """
    check_solver(solver)
    if solver == "torch" or (solver == "auto" and chosen.device.type != "cuda"):
        return "torch"
    obstacle = _triton_obstacle(chosen, rejected, reg=reg, reg_m=reg_m, tolerance=tolerance)
    if obstacle is None:
        return "triton"
    if solver == "triton":
        raise ValueError(f"`solver='triton'` cannot run: {obstacle}. Change that, or set it to 'auto' or 'torch'.")
    logger.warning_once(f"Transport runs in plain torch, not in Triton: {obstacle}.")
    return "torch"


def _triton_obstacle(chosen: Tensor, rejected: Tensor, *, reg: float, reg_m: float, tolerance: float) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed (pip install 'otpo[triton]')"
    from otpo_kernels import sinkhorn as kernels

    device = chosen.device
    if device.type != "cuda" and not kernels.INTERPRETED:
        return f"the hidden states are on '{device.type}', not on a GPU"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if chosen.dtype not in kernels.DTYPES or rejected.dtype != chosen.dtype:
        return f"hidden states of {chosen.dtype} and {rejected.dtype} are not both of one 16-bit type or float32"
    longest = max(chosen.size(1), rejected.size(1))
    if longest > kernels.LONGEST:
        return f"a row of {longest} positions is longer than {kernels.LONGEST}"
    for (name, least), value in zip(kernels.SMALLEST.items(), (reg, reg_m, tolerance), strict=True):
        if value < least:
            return f"`{name}` {value:g} is below {least:g}, the least that float32 matrices serve"
    return None


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
