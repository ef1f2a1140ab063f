"""The scales: what a number of FP8 stands for, of each matrix's weights and of what goes into it.

A scale is the largest absolute value divided by 448, the largest number of float8_e4m3fn; compressed-tensors computes
it. All scales are float32.

An input that calibration saw as zeros alone says nothing of what comes later, and the scale that follows from it, the
smallest there is, would clip everything. An expert takes its layer's largest then, as one without rows does. Where the
layer or the linear layer has nothing either, the scale is [`NEUTRAL`]: FP8 as it is, up to 448.

Shapes: L layers with experts, E experts, S other linear layers, N documents.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_backbone.conversion.tensors import Tensors

from .observing import PRODUCTS, Observations
from .scheme import Target, compressed_tensors

NEUTRAL = 1.0
"""The scale of an input of which nothing but zeros was seen."""


class Zeros(NamedTuple):
    """Inputs that were zeros alone.

    Attributes:
        what: Name of a linear layer, or `"layer 3 expert 1"` and its product.
        scale: Why it is what it is: `"its layer's largest"` or `"1"`.
    """

    what: str
    scale: str


class InputScales(NamedTuple):
    """Static scales of what goes into each matrix.

    Attributes:
        layers: Number of each layer with experts.
        experts: By product, `"gate_up"` and `"down"`: `(L, E)`, float32.
        linears: By the linear layer's name: `(1,)`, float32.
        unseen: Layer and expert of each that has seen no row; these have the largest scale of their layer.
        zeros: What has seen rows, and zeros alone in them.
    """

    layers: tuple[int, ...]
    experts: dict[str, Tensor]
    linears: dict[str, Tensor]
    unseen: list[tuple[int, int]]
    zeros: list[Zeros]

    def of(self, target: Target) -> Tensor:
        """The scale `(1,)` of what goes into a matrix."""
        if target.linear is not None:
            return self.linears[target.linear]
        return self.experts[target.product][self.layers.index(target.layer), target.expert].reshape(1)

    def largest_of_layers(self) -> "InputScales":
        """The scales that vLLM computes with: each layer's largest for all of its experts."""
        merged = {name: scale.amax(1, keepdim=True).expand_as(scale) for name, scale in self.experts.items()}
        return self._replace(experts=merged)


def input_scales(observations: Observations, drawn: list[int], args: Any) -> InputScales:
    """The scales that drawn documents give.

    Args:
        observations: Of all candidates.
        drawn: Numbers of the documents, at least one.
        args: compressed-tensors' `QuantizationArgs` of inputs, of one scale a matrix.
    """
    seen_LE = observations.rows_NLE[drawn].sum(0) > 0
    layers = observations.layers
    experts: dict[str, Tensor] = {}
    zeros: list[Zeros] = []
    for product in PRODUCTS:
        largest_LE = observations.largest[product][drawn].amax(0)
        layers_L1 = largest_LE.amax(1, keepdim=True)
        experts[product] = _input_scales(torch.where(largest_LE > 0, largest_LE, layers_L1), args)
        for place, expert in (seen_LE & (largest_LE == 0)).nonzero().tolist():
            told = "its layer's largest" if layers_L1[place] > 0 else f"{NEUTRAL:g}"
            zeros.append(Zeros(f"layer {layers[place]} expert {expert}, {product}", told))
    largest_S = observations.linear_NS[drawn].amax(0)
    linears = dict(zip(observations.linears, _input_scales(largest_S, args).split(1), strict=True))
    zeros += [Zeros(observations.linears[place], f"{NEUTRAL:g}") for place in (largest_S == 0).nonzero().flatten()]
    unseen = [(layers[place], expert) for place, expert in (~seen_LE).nonzero().tolist()]
    return InputScales(layers, experts, linears, unseen, zeros)


def _input_scales(largest: Tensor, args: Any) -> Tensor:
    """Scales of inputs, [`NEUTRAL`] where there is 0."""
    return torch.where(largest > 0, scales(largest, args), NEUTRAL)


def weight_scales(tensors: Tensors, targets: list[Target], args: Any) -> dict[str, Tensor]:
    """The scale of each matrix's weights, by the matrix's name; its files are read once, one matrix at a time.

    Args:
        tensors: Of the files.
        targets: Matrices that become FP8.
        args: `QuantizationArgs` of weights.

    Returns:
        `(1,)` for one scale a matrix, which matrices that are multiplied as one share, or `(outputs, 1)`.

    Raises:
        ValueError: Weights are not finite.
    """
    of_channels = str(args.strategy) == "channel"
    largest: dict[str, Tensor] = {}
    for target in targets:
        weight = tensors[f"{target.name}.weight"].whole().float().abs()
        found = weight.amax(1, keepdim=True) if of_channels else weight.amax().reshape(1)
        if not found.isfinite().all():
            raise ValueError(f"{target.name}.weight has values that are not finite. FP8 can't hold them.")
        largest[target.name] = found
    if not of_channels:
        shared: dict[str, Tensor] = {}
        for target in targets:
            shared[target.sharing] = torch.maximum(largest[target.name], shared.get(target.sharing, torch.zeros(1)))
        largest = {target.name: shared[target.sharing] for target in targets}
    return {name: scales(value, args) for name, value in largest.items()}


def scales(largest: Tensor, args: Any) -> Tensor:
    """Scales of the largest absolute values, float32, of the same shape; a tiny one where there is 0."""
    largest = largest.float()
    return (
        compressed_tensors("quantization.utils").calculate_qparams(-largest, largest, args)[0].reshape(largest.shape)
    )


def to_fp8(values: Tensor, scale: Tensor, args: Any) -> Tensor:
    """Values as float8_e4m3fn, rounded to the nearest; those beyond its range become its largest.

    Args:
        values: `(R, D)` in floating point.
        scale: `(1,)`, or `(R, 1)`.
        args: `QuantizationArgs`.
    """
    zero = torch.zeros_like(scale)
    return compressed_tensors("quantization.lifecycle.forward").quantize(
        values.float(), scale, zero, args, dtype=torch.float8_e4m3fn
    )


def from_fp8(values: Tensor, scale: Tensor, args: Any) -> Tensor:
    """What values of float8_e4m3fn stand for, in float32."""
    zero = torch.zeros_like(scale)
    return compressed_tensors("quantization.lifecycle.forward").dequantize(
        values, scale, zero, args, dtype=torch.float32
    )
