"""Which of transformers' experts functions runs a model's experts by default, and why it is not `memcpy`.

`choose_experts` is a pure function of facts; `find_experts` reads these off a model. Nothing here changes a model.
"""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .memcpy_experts import NAME

GROUPED = ("grouped_mm", NAME)
"""Experts functions that multiply by torch's grouped products."""
_OF_HUB = ("deepgemm", "sonicmoe")
ROW_BYTES = 16
"""Rows of torch's grouped products are whole multiples of this."""
_FLAGS = {"has_gate", "has_bias", "is_transposed"}  # that `use_experts_implementation` leaves on each experts module
_PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (nn.Parameter, Tensor, DTensor)
_OWN_EXPERTS = re.compile(r"Experts\b|Experts[A-Z0-9]")


class ExpertsKind(NamedTuple):
    """What the choice looks at of the experts modules of a model; equal ones are one kind.

    Attributes:
        module: Name of the modules' class.
        runs_by_name: Whether `use_experts_implementation` decorates the class, so that the model's
            `experts_implementation` says what runs it. A gate, biases or a norm of its own make no difference, since
            `memcpy` covers all that the decorator knows.
        dtype: Of the weights; None where there are none that we know.
        quantized: What the weights are stored as where these are not plain numbers of `dtype`; None where they are.
        widths: Numbers in a row that comes in, and in one between the two products, by the field's names for them;
            empty where an engine holds the weights in a form that does not tell.
        running: The experts function that runs now; `"eager"` for a class that is not run by name.
    """

    module: str
    runs_by_name: bool
    dtype: torch.dtype | None
    quantized: str | None
    widths: tuple[tuple[str, int], ...]
    running: str


class Choice(NamedTuple):
    """An experts function and why it is not a faster one.

    Attributes:
        name: As `set_experts_implementation` takes it.
        reason: Why it is not `memcpy` on a GPU, or not a grouped product elsewhere; None where nothing is to be said.
    """

    name: str
    reason: str | None


def known_experts() -> list[str]:
    """The names that `experts_implementation` may have: ours, transformers', and whatever else was registered."""
    return list(dict.fromkeys([NAME, "grouped_mm", "batched_mm", "eager", *sorted(ALL_EXPERTS_FUNCTIONS)]))


def choose_experts(kinds: Sequence[ExpertsKind], device_type: str, itemsize: int, has_triton: bool) -> Choice:
    """The experts function that a training takes where its user names none.

    `memcpy` under CUDA, `grouped_mm` where that cannot run and on other devices, `eager` where grouped products cannot
    run. Quantized experts stay with what transformers chose as it loaded them.

    Args:
        kinds: Of one model, from [`find_experts`]; at least one.
        device_type: Of the device that trains, such as `"cuda"`.
        itemsize: Bytes of a number of mixed precision, 2 for bf16 and fp16; 4 without.
        has_triton: Whether Triton is installed.
    """
    reached = [kind for kind in kinds if kind.runs_by_name]
    if not reached:
        return Choice("eager", _not_reached(kinds[0]))
    for kind in reached:
        if kind.quantized is not None:
            return Choice(kind.running, _obstacle(kind, itemsize))
    for kind in reached:
        found = _obstacle(kind, itemsize)
        if found is not None:
            return Choice("eager", found)
    if device_type == "cuda":
        return Choice(NAME, None) if has_triton else Choice("grouped_mm", "Triton is not installed")
    return Choice("grouped_mm", None if device_type == "cpu" else f"its kernels need CUDA, and this is {device_type}")


def obstacle(name: str, kinds: Sequence[ExpertsKind], device_type: str, itemsize: int, has_triton: bool) -> str | None:
    """Why an experts function cannot run a model's experts; None where nothing is known to be in its way.

    Args:
        name: Of the function.
        kinds: As in [`choose_experts`], like the other arguments.
        device_type: Of the device that trains.
        itemsize: Bytes of a number of mixed precision.
        has_triton: Whether Triton is installed.
    """
    reached = [kind for kind in kinds if kind.runs_by_name]
    if not reached:
        return None if name == "eager" else _not_reached(kinds[0])
    for kind in reached if name in GROUPED else ():
        if (
            kind.quantized is not None and name != NAME
        ):  # transformers has a function of that name for what it quantizes itself
            continue
        found = _obstacle(kind, itemsize)
        if found is not None:
            return found
    if name == NAME and device_type == "cuda" and not has_triton:
        return "Triton is not installed"
    return _obstacle_of_hub(name, device_type)


def _obstacle_of_hub(name: str, device_type: str) -> str | None:
    """What is in the way of a function whose kernels transformers fetches from the Hub as the first batch runs."""
    if name not in _OF_HUB:
        return None
    if device_type != "cuda":
        return f"its kernels need CUDA, and this is {device_type}"
    try:
        version("kernels")  # of the distribution: a folder of that name is enough to import one
    except PackageNotFoundError:
        return "it needs the package `kernels` (`pip install kernels`)"
    return None


def find_experts(model: nn.Module) -> list[ExpertsKind]:
    """The kinds of experts that a model has; none for a dense one.

    A module is one of experts if transformers' decorator marks it, or, of models that go without it, if its class is
    called so or it is a list called `experts`.

    Args:
        model: Any model, also wrapped by an adapter or an engine.
    """
    kinds: list[ExpertsKind] = []
    for name, module in model.named_modules():
        if vars(module).keys() >= _FLAGS:
            kind = _decorated(module)
        elif _OWN_EXPERTS.search(type(module).__name__) or (
            isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
        ):
            shown = module[0] if isinstance(module, nn.ModuleList) and len(module) else module
            kind = ExpertsKind(type(shown).__name__, False, None, None, (), "eager")
        else:
            continue
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def _decorated(module: Any) -> ExpertsKind:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight, down = getattr(module, first, None), getattr(module, "down_proj", None)
    kind, running = type(module).__name__, str(module.config._experts_implementation)
    if not isinstance(weight, Tensor) or not isinstance(down, Tensor):
        return ExpertsKind(kind, True, None, f"without `{first}` and `down_proj`", (), running)
    stored = None
    if type(weight) not in _PLAIN:
        stored = type(weight).__name__
    elif not weight.is_floating_point() or weight.element_size() == 1:
        stored = _short(weight.dtype)
    return ExpertsKind(kind, True, weight.dtype, stored, _widths(down, module.is_transposed), running)


def _widths(down: Any, is_transposed: bool) -> tuple[tuple[str, int], ...]:
    """Hidden size and width of an expert by the down projection, `(E, D, F)` or transposed `(E, F, D)`."""
    shape = tuple(getattr(down, "ds_shape", down.shape))  # ZeRO-3 holds an empty tensor and tells the whole one's
    if len(shape) != 3:
        return ()
    hidden, width = (shape[2], shape[1]) if is_transposed else (shape[1], shape[2])
    return ("hidden_size", hidden), ("moe_intermediate_size", width)


def _obstacle(kind: ExpertsKind, itemsize: int) -> str | None:
    """Why grouped products cannot run plain weights of that kind."""
    if kind.quantized is not None or kind.dtype is None:
        return f"the weights of {kind.module} are quantized ({kind.quantized})"
    if kind.dtype not in _PRODUCTS:
        return f"grouped products take no {_short(kind.dtype)}, the dtype of {kind.module}"
    multiple = ROW_BYTES // min(itemsize, kind.dtype.itemsize)
    for name, width in kind.widths:
        if width % multiple:
            return f"`{name}={width}` of {kind.module} must be a multiple of {multiple} in this precision"
    return None


def _not_reached(kind: ExpertsKind) -> str:
    return f"{kind.module} runs code of its own, which transformers' `experts_implementation` does not reach"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
