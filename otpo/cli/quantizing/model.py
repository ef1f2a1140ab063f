"""The model that `otpo quantize` takes: exported where it is a Compass one, loaded once, and its tensors as files."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_backbone.conversion.exporting import cast_all, export_model
from moe_backbone.conversion.tensors import Tensors, read_tensors, split_experts
from moe_backbone.conversion.unfinished import unfinished_folder
from moe_backbone.model.configuration_compass import CompassConfig
from moe_backbone.quantization.scheme import Target, find_targets, require_full_precision
from moe_backbone.quantization.tapping import Places, find_places
from otpo.cli.converting.command import parse_size
from otpo.cli.converting.source import open_source
from otpo.cli.models import compass  # noqa: F401 - makes its models known to the Auto classes
from otpo.cli.models.loading import default_device

from .documents import longest_document


class Opened(NamedTuple):
    """A model in full precision, in memory and as files.

    Attributes:
        folder: Of the files.
        tensors: Of the files, experts one by one.
        model: In evaluation mode.
        tokenizer: None where there is none.
        places: The matrices of the model.
        targets: The matrices of the files that become FP8.
        kind: What the architecture is called, and how it came about.
    """

    folder: Path
    tensors: Tensors
    model: Any
    tokenizer: Any
    places: Places
    targets: list[Target]
    kind: str


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Opened]:
    """Opens a model; a Compass one is exported for that time beside the new folder.

    Sets `max_length` of the options, where documents are named, to what the model allows.

    Raises:
        ValueError: It can't be read, is quantized, is of a kind that isn't covered, or has fewer positions than
            `max_length`.
    """
    source = open_source(options.model, options.revision, keep_dtype=options.dtype is None)
    require_full_precision(source.config)
    if options.dataset_name is not None:
        options.max_length = longest_document(source.config, options.max_length)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(out) as temporary:
        folder, kind = source.folders[0], None
        if isinstance(source.config, CompassConfig):
            folder = temporary / "exported"
            written = export_model(
                source.config,
                source.tensors,
                folder,
                side_folders=source.folders,
                dtype=dtype,
                max_shard_size=parse_size(options.max_shard_size),
            )
            kind = f"{written.architecture}, exported from {written.source}"
        elif source.model is not None:
            raise ValueError(
                f"`MODEL={options.model}` is an adapter on a model of `model_type={source.config.model_type}`. Those "
                "of Compass models are merged here; merge this one into its model, and name that."
            )
        del source
        yield _loaded(options, folder, dtype, kind)


def _loaded(options: argparse.Namespace, folder: Path, dtype: torch.dtype | None, kind: str | None) -> Opened:
    device = options.device or default_device()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", device_map={"": device}, trust_remote_code=False
    )
    # The routers' loss only teaches, and transformers 5.23 can't compute it while a model answers a padded batch.
    model.config.output_router_logits = False
    places = find_places(model.eval())
    tensors = split_experts(read_tensors(folder), places.num_experts)
    if dtype is not None:
        tensors = cast_all(tensors, dtype)
    targets = find_targets(tensors, places)
    tokenizer = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if (folder / "tokenizer_config.json").is_file()
        else None
    )
    return Opened(folder, tensors, model, tokenizer, places, targets, kind or type(model).__name__)
