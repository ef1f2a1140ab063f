"""Exported models, random documents, and FP8 folders made of both."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compass_helpers import compass_model
from conversion_helpers import exported
from transformers import AutoModelForCausalLM

from moe_backbone.conversion.tensors import read_tensors, split_experts
from moe_backbone.quantization.observing import observe
from moe_backbone.quantization.scales import input_scales, weight_scales
from moe_backbone.quantization.scheme import find_targets, make_scheme
from moe_backbone.quantization.tapping import find_places
from moe_backbone.quantization.writing import quantized_tensors, write_folder

needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is an extra: pip install 'otpo[fp8]'"
)
VARIANTS = {"Qwen3-MoE": {}, "Qwen3-Next": {"num_shared_experts": 2}, "Mixtral": {"use_qk_norm": False}}


def exported_model(folder: Path, **changes: Any) -> Any:
    """A random Compass model, exported to `folder / "exported"` and loaded as what it became."""
    compass_model(**changes).save_pretrained(folder / "compass")
    exported(folder / "compass", folder / "exported")
    return AutoModelForCausalLM.from_pretrained(folder / "exported").eval()


def documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in lengths]


class Rounded(NamedTuple):
    """An FP8 folder, and what it was made of."""

    folder: Path
    model: Any
    places: Any
    targets: Any
    scheme: Any
    tensors: Any
    written: Any
    inputs: Any


def rounded(folder: Path, input_scales_kind: str = "static", **changes: Any) -> Rounded:
    """A model in FP8, with the scales of a few documents."""
    model = exported_model(folder, **changes)
    places = find_places(model)
    tensors = split_experts(read_tensors(folder / "exported"), places.num_experts)
    targets = find_targets(tensors, places)
    scheme = make_scheme(input_scales_kind)
    inputs = None
    if input_scales_kind == "static":
        found = observe(model, places, [documents(9, 3, 1), documents(17, seed=1)])
        inputs = input_scales(found, [0, 1, 2, 3], scheme.input_activations)
    weights = weight_scales(tensors, targets, scheme.weights)
    written = quantized_tensors(tensors, targets, scheme, weights, inputs)
    (folder / "fp8").mkdir()
    write_folder(tensors, targets, scheme, written, folder / "exported", folder / "fp8", 40_000)
    return Rounded(folder / "fp8", model, places, targets, scheme, tensors, written, inputs)
