"""Writes a Qwen3-MoE or Mixtral checkpoint as a Compass one, to be trained as Compass models are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from moe_backbone.model import modeling_compass

from .exporting import Written, cast, write_converted
from .folders import require_complete
from .sources import PREFIXES, compass_options, compass_tensors, make_config
from .tensors import Tensors, split_experts


def import_model(
    config: PreTrainedConfig,
    tensors: Tensors,
    out: str | Path,
    *,
    side_folders: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Path, Written], None] | None = None,
) -> Written:
    """Writes a model of another architecture as the Compass model that computes the same; see `sources`.

    Args:
        config: Of the other model.
        tensors: Its tensors, from [`read_tensors`][moe_backbone.conversion.tensors.read_tensors].
        out: A new folder. It gets its name when it is whole.
        side_folders: Where tokenizer and generation configuration are looked for, first things first.
        dtype: Of the weights; None keeps each as it is.
        max_shard_size: Bytes of a file at most, or a text such as "5GB". So much memory is needed.
        progress: Called after each file with the number of files written and of all files.
        check: Called with the whole folder before it gets its name, which it does not get where this raises.

    Raises:
        ValueError: No Compass model computes the same, the tensors are not those of `config`, or `out` is there.
    """
    options, left_out = compass_options(config)
    kind: Any = config.model_type
    compass = make_config(options)
    prefix = PREFIXES[kind]
    source = (config.architectures or [f"{prefix}ForCausalLM"])[0]
    name = source.replace(prefix, "Compass", 1)
    model_class = getattr(modeling_compass, name, None)
    if model_class is None or not source.startswith(prefix):
        raise ValueError(f"`architectures={config.architectures}`: there is no {name}.")
    changed = compass_tensors(kind, split_experts(tensors, compass.num_experts))
    if dtype is not None:
        changed = {name: cast(tensor, dtype) for name, tensor in changed.items()}
    changed = require_complete(changed, model_class, compass, "the checkpoint")
    kept = changed[next(iter(changed))].dtype
    why = "the same weights under the same names" if kind == "qwen3_moe" else "the same weights under other names"
    planned = Written(name, "Compass", why, kept, 0, left_out, source)
    return write_converted(changed, compass, out, planned, side_folders, max_shard_size, progress, check, drafts=True)
