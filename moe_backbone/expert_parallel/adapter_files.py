"""The files from which a run with adapters and spread experts resumes, whatever spreads its experts.

An adapter is small, so its optimizer's states are written whole: for each trained tensor its float32 values and the
optimizer's means of gradients, under the tensor's name in the unspread model. They load into any number of processes,
size of expert parallelism and engine. The model under the adapter is not written again. Beside the states stands what
the tensors alone do not tell: the rank of each adapter and what its product is multiplied by.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .resume import ADAPTER_STATES_FILE

_REST_FILE = "adapter_run.bin"
_SIZES = "adapters"
VALUE = "fp32"
"""What a tensor's own values are called beside its states."""


_BY_NUMBER = ("adamw_torch", "adamw_torch_fused", "sgd")


def check_optimizer(optim: Any) -> None:
    """Raises a `ValueError` for an optimizer whose states do not have a number for each number of a tensor.

    Args:
        optim: The training option of that name.
    """
    name = getattr(optim, "value", optim)
    if name not in _BY_NUMBER:
        raise ValueError(
            f"`optim={name}` with an adapter and spread experts: its states could not be resumed. Set one of: "
            f"{', '.join(_BY_NUMBER)}."
        )


def count_of_steps(optimizer: Any, steps: int, parameter: Tensor) -> Tensor:
    """An optimizer's own count, where it keeps it: beside the parameter if its step is fused, else on the CPU.

    Args:
        optimizer: torch's.
        steps: That it has taken.
        parameter: One of its parameters.
    """
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(steps), device=parameter.device if beside else "cpu")


class AdapterSize(NamedTuple):
    """How large an adapter of one module is.

    Attributes:
        rank: r.
        scaling: What the product of its factors is multiplied by; `lora_alpha / r`, or by `use_rslora` over its root.
    """

    rank: int
    scaling: float

    def __str__(self) -> str:
        return f"rank {self.rank} and scaling {self.scaling:g}"


class SavedStates(NamedTuple):
    """An adapter's states in a checkpoint.

    Attributes:
        tensors: The open file; `get_tensor(f"{name}.{key}")` reads one.
        keys: Names of the states that each trained tensor has.
        rest: What else was saved: steps that the optimizer has taken, and what the engine counts.
    """

    tensors: Any
    keys: list[str]
    rest: dict[str, Any]


def write_states(
    folder: str | Path, states: Mapping[str, Tensor], rest: Mapping[str, Any], sizes: Mapping[str, AdapterSize]
) -> None:
    """Writes an adapter's states; one process calls it.

    Args:
        folder: `global_step*` in a checkpoint of the Trainer's.
        states: Whole tensors by name and key.
        rest: Numbers, strings and mappings of them.
        sizes: Of the adapters, [`adapters.adapter_sizes`].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_STATES_FILE).unlink(missing_ok=True)  # of a run before, whose states are not of this step
    plain = {name: tuple(size) for name, size in sizes.items()}  # torch reads no classes of ours
    torch.save({**rest, _SIZES: plain}, folder / _REST_FILE)
    unfinished = folder / f".{ADAPTER_STATES_FILE}"
    save_file({name: value.contiguous() for name, value in states.items()}, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / ADAPTER_STATES_FILE)  # a checkpoint that was killed while it was written has none


def open_states(
    folder: str | Path, shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, AdapterSize]
) -> SavedStates:
    """Opens what [`write_states`] wrote.

    Args:
        folder: As there.
        shapes: The run's trained tensors and the shape of each in the unspread model.
        sizes: Of the run's adapters, [`adapters.adapter_sizes`]. A checkpoint of before they were written is compared
            by the shapes of its tensors alone.

    Raises:
        ValueError: The checkpoint's adapter has other tensors, another rank or another scaling.
    """
    folder = Path(folder)
    file = safe_open(folder / ADAPTER_STATES_FILE, "pt")
    rest = torch.load(folder / _REST_FILE, weights_only=True)
    saved = set(file.keys())
    keys = sorted({name.rpartition(".")[2] for name in saved} - {VALUE})
    wanted = {f"{name}.{key}" for name in shapes for key in (VALUE, *keys)}
    if saved != wanted:
        raise _other_adapter(folder, f"of other tensors than this run's, such as {_name(sorted(saved ^ wanted)[0])}")
    written: dict[str, Any] = rest.get(_SIZES, {})
    for name, size in sizes.items():
        before = AdapterSize(*written.get(name, size))
        if before.rank != size.rank or not math.isclose(before.scaling, size.scaling, rel_tol=1e-6):
            raise _other_adapter(folder, f"of {before} on {name}, and this run's has {size}")
    for name in sorted(saved):
        before, shape = tuple(file.get_slice(name).get_shape()), tuple(shapes[_name(name)])
        if before != shape:
            raise _other_adapter(folder, f"whose {_name(name)} is {before}, and this run's is {shape}")
    return SavedStates(file, keys, rest)


def _name(state: str) -> str:
    """The name of the tensor that a state is of."""
    return state.rpartition(".")[0]


def _other_adapter(folder: Path, which: str) -> ValueError:
    return ValueError(
        f"`resume_from_checkpoint={folder.parent}` has an adapter {which}. Set the options of the adapter (`lora_*`, "
        "such as `lora_r`, `lora_alpha` and `use_rslora`) as they were, or start from its weights "
        "(`model_name_or_path`)."
    )
