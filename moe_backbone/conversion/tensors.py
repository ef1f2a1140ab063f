"""A checkpoint's tensors by name, read from disk when they are written and never all at once.

Shapes: E experts, I an expert's width, H hidden size.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
# Experts in one tensor for a layer: as transformers has them in memory, and as DeepSpeed's layer has them.
_PACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_SPREAD = re.compile(r"(.*\.experts)\.experts\.(w1|w2|w3)")
# What `torch.load` raises for files that are damaged or hold objects of other classes than tensors.
_UNREADABLE = (
    *(UnpicklingError, RuntimeError, EOFError, LookupError),
    *(ValueError, TypeError, AttributeError, AssertionError),
)
_DEEPSPEED_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        read: Reads the part of it that an index names; `()` is all of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[tuple[Any, ...]], Tensor]

    def whole(self) -> Tensor:
        """Reads all of it."""
        return self.read(())

    def part(self, *index: int | slice) -> "LazyTensor":
        """A part, which is read without the rest."""
        shape = tuple(self._empty()[index].shape)
        return LazyTensor(shape, self.dtype, lambda inner: self.read(index)[inner])

    def map(self, change: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """What a function makes of it; the function also has to run on meta tensors, which tell the result's shape."""
        changed = change(self._empty())
        return LazyTensor(tuple(changed.shape), changed.dtype, lambda index: change(self.whole())[index])

    def _empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Tensors = dict[str, LazyTensor]


def read_tensors(folder: str | Path) -> Tensors:
    """Finds the tensors of a model's folder: one safetensors file or several, or torch's own format.

    Args:
        folder: What `save_pretrained` or a trainer wrote.

    Raises:
        ValueError: The folder has no weights, or its index names files that are not there.
    """
    folder = Path(folder)
    for index_name, name in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        index = folder / index_name
        if index.is_file():
            weight_map = _weight_map(index)
            return _read_files(folder, sorted(set(weight_map.values())), set(weight_map), index_name)
        if (folder / name).is_file():
            return _read_files(folder, [name], None, name)
    raise ValueError(
        f"{folder} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, nor {WEIGHTS_NAME}. "
        "Name the folder that `save_pretrained` or a trainer wrote."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{index} can't be read: it has no JSON with a `weight_map`. Copy it again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: `weight_map` does not give each tensor its file. Copy it again.")
    return weight_map


def _read_files(folder: Path, names: list[str], wanted: set[str] | None, index: str) -> Tensors:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / index} names {', '.join(missing)}, which is not there. Copy the whole folder.")
    tensors: Tensors = {}
    for name in names:
        path = folder / name
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        tensors |= {key: tensor for key, tensor in found.items() if wanted is None or key in wanted}
    absent = sorted((wanted or set()) - set(tensors))
    if absent:
        raise ValueError(f"{folder / index} names {absent[0]}, which its file does not have. Save the model again.")
    return tensors


def _read_safetensors(path: Path) -> Tensors:
    file = safe_open(path, "pt")
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        found = file.get_slice(name)
        if found.get_dtype() not in _DTYPES:
            raise ValueError(f"{path}: {name} is of type {found.get_dtype()}: quantized weights can't be converted.")

        def read(index: tuple[Any, ...], name: str = name) -> Tensor:
            return file.get_slice(name)[index] if index else file.get_tensor(name)

        tensors[name] = LazyTensor(tuple(found.get_shape()), _DTYPES[found.get_dtype()], read)
    return tensors


def _read_torch(path: Path) -> Tensors:
    """Of torch's own format; files of torch before 1.6 are no archives, which can't be mapped, and are read whole."""
    try:
        state = torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} can't be read: it is damaged, or holds more than weights, which could run code. Copy it again, "
            "or save the model as safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} has more than tensors by their names. Save the model's `state_dict()` alone.")
    return state_tensors(state)


def state_tensors(state: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a state dict, which has them in memory already."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda index, tensor=tensor: tensor.detach()[index])
        for name, tensor in state.items()
    }


def split_experts(tensors: Tensors, num_experts: int) -> Tensors:
    """Gives each expert's matrices keys of their own, as files of transformers have them.

    The experts of a layer may also stand in two tensors, `gate_up_proj [E, 2 I, H]` and `down_proj [E, H, I]`, as
    state dicts have them, or in DeepSpeed's three, `w1` and `w3 [E, I, H]` and `w2 [E, H, I]`.

    Args:
        tensors: By name.
        num_experts: E.

    Raises:
        ValueError: A tensor has fewer experts than the model.
    """
    split: Tensors = {}
    for name, tensor in tensors.items():
        packed, spread = _PACKED.fullmatch(name), _SPREAD.fullmatch(name)
        found = packed or spread
        if found is None:
            split[name] = tensor
            continue
        if tensor.shape[0] != num_experts:
            raise ValueError(
                f"{name} has {tensor.shape[0]} of {num_experts} experts: the file is one process's part of a run that "
                "spreads experts. Name the folder that the trainer's `save_model` wrote."
            )
        prefix, kind = found.groups()
        for expert in range(num_experts):
            if kind == "gate_up_proj":
                width = tensor.shape[1] // 2
                split[f"{prefix}.{expert}.gate_proj.weight"] = tensor.part(expert, slice(None, width))
                split[f"{prefix}.{expert}.up_proj.weight"] = tensor.part(expert, slice(width, None))
            else:
                split[f"{prefix}.{expert}.{_DEEPSPEED_NAMES.get(kind, kind)}.weight"] = tensor.part(expert)
    return split
