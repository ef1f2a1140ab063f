"""Writes the FP8 folder: weights a shard at a time, scales beside them, `config.json` with the scheme."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

from moe_backbone.conversion.folders import copy_side_files, write_weights
from moe_backbone.conversion.tensors import LazyTensor, Tensors, state_tensors

from .scales import InputScales, to_fp8
from .scheme import Target, left_alone, quantization_config


class Bytes(NamedTuple):
    """Sizes of weights.

    Attributes:
        before: Bytes of all tensors as they were.
        after: Bytes of all tensors with FP8 and scales.
    """

    before: int
    after: int


def quantized_tensors(
    tensors: Tensors, targets: list[Target], scheme: Any, weights: dict[str, Tensor], inputs: InputScales | None
) -> Tensors:
    """A checkpoint's tensors with `weight` in FP8, and `weight_scale` and `input_scale` beside each.

    Args:
        tensors: Of the files, by name.
        targets: Matrices that become FP8.
        scheme: Of [`moe_backbone.quantization.scheme.make_scheme`].
        weights: Scale of each matrix, float32.
        inputs: Static scales of inputs; None where they are dynamic.
    """
    found = {target.name: target for target in targets}
    written: Tensors = {}
    for key, tensor in tensors.items():
        target = found.get(key.removesuffix(".weight"))
        if target is None:
            written[key] = tensor
            continue
        beside = {f"{target.name}.weight_scale": weights[target.name]}
        if inputs is not None:
            beside[f"{target.name}.input_scale"] = inputs.of(target)
        written[key] = _lazily_fp8(tensor, weights[target.name], scheme.weights)
        written |= state_tensors(beside)
    return written


def _lazily_fp8(tensor: LazyTensor, scale: Tensor, args: Any) -> LazyTensor:
    return LazyTensor(tensor.shape, torch.float8_e4m3fn, lambda index: to_fp8(tensor.whole(), scale, args)[index])


def write_folder(
    tensors: Tensors,
    targets: list[Target],
    scheme: Any,
    quantized: Tensors,
    source: Path,
    folder: Path,
    max_shard_size: int | str,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes weights, configuration, tokenizer and generation configuration.

    Args:
        tensors: As they were.
        targets: Matrices that become FP8.
        scheme: Of the matrices.
        quantized: Of [`quantized_tensors`].
        source: Folder of the model as it was, whose `config.json` is taken over.
        folder: Where to write; it is there.
        max_shard_size: Bytes of a file at most, which is also the memory that is needed.
        progress: Called after each file with the number of files written and of all files.

    Returns:
        The number of files.
    """
    shards = write_weights(quantized, folder, max_shard_size, progress)
    config = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    # The weights may have been asked for in another type than the model came in.
    types = Counter(tensor.dtype for tensor in tensors.values())
    named = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config |= dict.fromkeys(named, str(types.most_common(1)[0][0]).removeprefix("torch."))
    config["quantization_config"] = quantization_config(scheme, left_alone(tensors, targets))
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_side_files([source], folder, drafts=False)
    return shards


def count_bytes(tensors: Tensors, quantized: Tensors) -> Bytes:
    """How many bytes the weights take before and after."""
    return Bytes(_bytes(tensors.values()), _bytes(quantized.values()))


def _bytes(tensors: Sequence[LazyTensor] | Any) -> int:
    return sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in tensors)
