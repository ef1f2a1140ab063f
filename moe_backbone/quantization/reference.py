"""The model that an FP8 checkpoint stands for, in floating point: rounded weights, and inputs as they will be rounded.

It multiplies the rounded numbers in the model's own dtype. In float32 that is what FP8's products are, apart from the
order of their sums; vLLM's kernels sum in float32 too.

Shapes: E experts, F an expert's width, R rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .scales import InputScales, from_fp8, scales, to_fp8
from .scheme import Target
from .tapping import Places, Rows


@torch.no_grad()
def load_rounded(model: nn.Module, places: Places, targets: list[Target], tensors: Any, args: Any) -> None:
    """Puts the weights of an FP8 checkpoint into the model that it was made of, in place.

    Args:
        model: Its weights are overwritten.
        places: Of the model.
        targets: Matrices that are FP8.
        tensors: The written checkpoint's tensors, by name.
        args: `QuantizationArgs` of weights.
    """
    for target in targets:
        weight = from_fp8(
            tensors[f"{target.name}.weight"].whole(), tensors[f"{target.name}.weight_scale"].whole(), args
        )
        parameter_of(places, target).copy_(weight)


def parameter_of(places: Places, target: Target) -> Tensor:
    """The part of the model's parameters that a matrix is."""
    if target.linear is not None:
        return places.linears[target.linear].weight
    experts = places.experts[places.layers.index(target.layer)]
    if target.part == "down":
        return experts.down_proj[target.expert]
    width = experts.gate_up_proj.shape[1] // 2
    rows = slice(None, width) if target.part == "gate" else slice(width, None)
    return experts.gate_up_proj[target.expert, rows]


class RoundedInputs:
    """The tap that rounds what goes into each matrix to FP8 and back.

    Args:
        args: `QuantizationArgs` of inputs.
        found: Static scales; None where each token has its own.
    """

    def __init__(self, args: Any, found: InputScales | None):
        self.args = args
        self.found = found

    def keeps(self) -> None:
        """All tokens go to experts."""
        return

    def gate_up(self, layer: int, rows: Rows) -> Tensor:
        """Rounds rows before the first product."""
        return self._rows("gate_up", layer, rows)

    def down(self, layer: int, rows: Rows) -> Tensor:
        """Rounds rows before the second product."""
        return self._rows("down", layer, rows)

    def linear(self, name: str, values: Tensor) -> Tensor:
        """Rounds what goes into a linear layer."""
        scale = None if self.found is None else self.found.linears[name].to(values.device)
        return self._rounded(values, scale)

    def _rows(self, product: str, layer: int, rows: Rows) -> Tensor:
        if self.found is None:
            return self._rounded(rows.values_RX, None)
        scale_E = self.found.experts[product][self.found.layers.index(layer)].to(rows.values_RX.device)
        # Rows that go nowhere take the last expert's scale; nothing comes of them.
        return self._rounded(rows.values_RX, scale_E[rows.experts_R.clamp(max=len(scale_E) - 1)][:, None])

    def _rounded(self, values: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            scale = scales(values.abs().amax(-1, keepdim=True), self.args)
        return from_fp8(to_fp8(values, scale, self.args), scale, self.args).to(values.dtype)
