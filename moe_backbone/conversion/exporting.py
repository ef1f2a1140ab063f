"""Writes a Compass checkpoint as one of an architecture that everyone reads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig

from moe_backbone.model import modeling_compass
from moe_backbone.model.configuration_compass import CompassConfig

from .folders import copy_side_files, new_folder, require_complete, write_config, write_weights
from .targets import choose_target, split_off, target_options, target_tensors
from .tensors import LazyTensor, Tensors, split_experts


class Written(NamedTuple):
    """What was written.

    Attributes:
        architecture: The class that loads it.
        title: What the architecture is called.
        why: How the model fits in.
        dtype: Of the weights.
        shards: Number of files of weights.
        left_out: Sentences on what is not in them.
        source: The class of the model that was converted.
    """

    architecture: str
    title: str
    why: str
    dtype: torch.dtype
    shards: int
    left_out: list[str]
    source: str


def export_model(
    config: CompassConfig,
    tensors: Tensors,
    out: str | Path,
    *,
    side_folders: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Path, Written], None] | None = None,
) -> Written:
    """Writes a Compass model as the architecture of transformers that computes the same; see `targets`.

    Args:
        config: Of the model.
        tensors: Its tensors, from [`read_tensors`][moe_backbone.conversion.tensors.read_tensors] or `state_tensors`.
        out: A new folder. It gets its name when it is whole.
        side_folders: Where tokenizer and generation configuration are looked for, first things first.
        dtype: Of the weights; None keeps each as it is.
        max_shard_size: Bytes of a file at most, or a text such as "5GB". So much memory is needed.
        progress: Called after each file with the number of files written and of all files.
        check: Called with the whole folder before it gets its name, which it does not get where this raises.

    Raises:
        ValueError: No architecture computes the same, the tensors are not those of `config`, or `out` is there.
    """
    # Refusals by the configuration come first, then those that have to look at tensors.
    target = choose_target(config)
    source_class = getattr(modeling_compass, (config.architectures or ["CompassForCausalLM"])[0], None)
    if source_class is None:
        raise ValueError(f"`architectures={config.architectures}` names no Compass model of this package.")
    name = source_class.__name__.replace("Compass", target.prefix, 1)
    target_class = getattr(transformers, name, None)
    if target_class is None:
        raise ValueError(f"`architectures={config.architectures}`: transformers has no {name}.")
    decoder, left_out = split_off(config, split_experts(tensors, config.num_experts))
    if dtype is not None:
        decoder = cast_all(decoder, dtype)
    options = target_options(config, target)
    changed = target_tensors(config, target, decoder)
    changed = require_complete(changed, target_class, target.config(**options), "the checkpoint")

    kept = changed[next(iter(changed))].dtype
    planned = Written(name, target.title, target.why, kept, 0, left_out, source_class.__name__)
    return write_converted(
        changed, target.config(**options), out, planned, side_folders, max_shard_size, progress, check, drafts=False
    )


def write_converted(
    tensors: Tensors,
    config: PreTrainedConfig,
    out: str | Path,
    planned: Written,
    side_folders: Sequence[Path],
    max_shard_size: int | str,
    progress: Callable[[int, int], None] | None,
    check: Callable[[Path, Written], None] | None,
    *,
    drafts: bool,
) -> Written:
    """Writes weights, configuration and side files of a converted model to a new folder.

    Args:
        tensors: Under their new names.
        config: Of the new architecture.
        out: See [`export_model`].
        planned: What is known of the model before it is written.
        side_folders: See [`export_model`], and so are `max_shard_size`, `progress` and `check`.
        max_shard_size: Bytes.
        progress: Called after each file.
        check: Called before the folder gets its name.
        drafts: Whether the model that is written has MTP layers, so that `generate` may draft with them.

    Returns:
        `planned` with the number of files, and what of the side files was left out.
    """
    with new_folder(out) as folder:
        shards = write_weights(tensors, folder, max_shard_size, progress)
        write_config(config, folder, planned.architecture, planned.dtype)
        left_out = [*planned.left_out, *copy_side_files(side_folders, folder, drafts=drafts)]
        written = planned._replace(shards=shards, left_out=left_out)
        if check is not None:
            check(folder, written)
    return written


def cast_all(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Tensors in another type, but for routers' biases, which models keep in float32."""
    return {
        name: tensor if name.endswith("e_score_correction_bias") else cast(tensor, dtype)
        for name, tensor in tensors.items()
    }


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """A tensor in another dtype."""
    return tensor if tensor.dtype == dtype else tensor.map(lambda value: value.to(dtype))
