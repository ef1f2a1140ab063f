"""Lets a function see, and change, what goes into every matrix of a model that FP8 takes: experts and linear layers.

Shapes: T tokens, K slots of a token, R = T * K rows grouped by expert, E experts, D hidden size, F the experts' width.
A tensor's suffix is its shape.

The experts run by an experts function of their own for that time, forward alone. It groups rows by a stable sort and
multiplies by torch's grouped products, so that nothing loops over rows or experts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _grouped_linear

from moe_backbone.experts_choice import find_experts
from moe_backbone.experts_choice import obstacle as find_obstacle

from .staying import find_staying, is_ignored

NAME = "tapped"
_TAP = "fp8_tap"
"""Attribute of an experts module with its tap, while one is there."""
_FLAGS = {"has_gate", "has_bias", "is_transposed"}  # that `use_experts_implementation` leaves on each experts module
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Rows(NamedTuple):
    """Rows on their way into the experts of a layer, grouped by expert.

    Attributes:
        values_RX: `(R, D)` before `gate_up`, `(R, F)` before `down`.
        experts_R: Expert of each row, int64; E for a row that goes nowhere, which stands behind all others.
        tokens_R: Token of each row, int64.
    """

    values_RX: Tensor
    experts_R: Tensor
    tokens_R: Tensor


class Tap(Protocol):
    """What sees the inputs, and may hand on others of the same shape and dtype."""

    def gate_up(self, layer: int, rows: Rows) -> Tensor:
        """Before the experts' first product."""
        ...

    def down(self, layer: int, rows: Rows) -> Tensor:
        """Before the experts' second product."""
        ...

    def linear(self, name: str, values: Tensor) -> Tensor:
        """Before a linear layer `(..., D)`."""
        ...

    def keeps(self) -> Tensor | None:
        """Which tokens go to experts, bool `(T,)`; None for all."""
        ...


class Places(NamedTuple):
    """The matrices of a model that FP8 takes.

    Attributes:
        layers: Number of each layer with experts, in order.
        experts: The experts' module of each.
        num_experts: E, of every layer.
        linears: The other linear layers by name.
    """

    layers: tuple[int, ...]
    experts: tuple[Any, ...]
    num_experts: int
    linears: dict[str, nn.Linear]


def find_places(model: nn.Module) -> Places:
    """Finds experts and linear layers, and refuses a model whose experts can't be run by grouped products.

    Args:
        model: Of transformers, with its weights in floating point. Layers of [`moe_backbone.quantization.staying`]
            are no places.

    Raises:
        ValueError: There are no experts, or they are of a form that is not covered; the message says which.
    """
    kinds = find_experts(model)
    name = type(model).__name__
    if not kinds:
        raise ValueError(f"{name} has no experts. Name a Mixture-of-Experts model.")
    found: dict[int, Any] = {}
    paths: list[str] = []
    for path, module in model.named_modules():
        number = _LAYER.search(f"{path}.")
        if vars(module).keys() >= _FLAGS and number is not None:
            found[int(number[1])] = module
            paths.append(path)
    kind = kinds[0].module
    if not found or not all(it.runs_by_name for it in kinds):
        raise ValueError(
            f"{kind} of {name} is not run by transformers' `experts_implementation`, so it isn't covered."
        )
    wrong = obstacle_of(next(iter(found.values()))) or find_obstacle("grouped_mm", kinds, "cpu", 4, has_triton=False)
    if wrong is not None:
        raise ValueError(f"{kind} of {name} isn't covered: {wrong}.")
    sizes = {int(module.num_experts) for module in found.values()}
    if len(sizes) > 1:
        raise ValueError(f"{name} has layers of {sorted(sizes)} experts. Layers of one number of experts are covered.")
    num_experts = sizes.pop()
    staying = find_staying(model, paths, num_experts)
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in staying and not is_ignored(path)
    }
    layers = sorted(found)
    return Places(tuple(layers), tuple(found[layer] for layer in layers), num_experts, linears)


def obstacle_of(experts: Any) -> str | None:
    """Why the experts of a module are not computed here; None where they are."""
    if not experts.has_gate:
        return "its experts have no gate"
    if experts.has_bias:
        return "its experts have biases"
    if experts.is_transposed or not getattr(experts, "is_concatenated", True):
        return "its experts' weights are transposed or interleaved"
    if experts._modules.get("post_expert_norm") is not None:
        return "a norm follows its experts"
    return None


@contextmanager
def tapped(model: Any, places: Places, tap: Tap) -> Iterator[None]:
    """Runs the model's forward passes through a tap; experts run as before when it is gone.

    Args:
        model: Of transformers, in evaluation mode.
        places: Of [`find_places`].
        tap: Sees and changes inputs.
    """
    before = model.config._experts_implementation
    model.set_experts_implementation(NAME)
    handles = [module.register_forward_pre_hook(_hook(tap, name)) for name, module in places.linears.items()]
    for layer, module in zip(places.layers, places.experts, strict=True):
        module.__dict__[_TAP] = (tap, layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in places.experts:
            del module.__dict__[_TAP]
        model.set_experts_implementation(before)


def _hook(tap: Tap, name: str) -> Callable[[nn.Module, Sequence[Any]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return (tap.linear(name, inputs[0]), *inputs[1:])

    return hook


@torch.no_grad()
def tapped_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum over a token's experts, as the forward of an experts module of transformers, through its tap.

    Args:
        self: The experts module.
        hidden_states: `(T, D)`.
        top_k_index: Experts of each token `(T, K)`; E for one that is not here.
        top_k_weights: `(T, K)`.
    """
    tap, layer = vars(self)[_TAP]
    keeps_T = tap.keeps()
    index_TK = top_k_index.long().clamp(max=self.num_experts)
    if keeps_T is not None:
        index_TK = index_TK.masked_fill(~keeps_T[:, None], self.num_experts)

    # Rows in the order of experts; those that go nowhere come last, behind every group.
    experts_R, order_R = index_TK.flatten().sort(stable=True)
    tokens_R = order_R // index_TK.shape[1]
    ends_E = torch.bincount(experts_R, minlength=self.num_experts + 1)[:-1].cumsum(0).int()

    x_RD = tap.gate_up(layer, Rows(hidden_states[tokens_R].to(self.gate_up_proj.dtype), experts_R, tokens_R))
    h_RF = self._apply_gate(_grouped_linear(x_RD, self.gate_up_proj, ends_E))
    # A grouped product leaves the rows behind the last group as it found them.
    nowhere_R = (experts_R == self.num_experts)[:, None]
    h_RF = tap.down(layer, Rows(h_RF.masked_fill(nowhere_R, 0.0), experts_R, tokens_R))
    y_RD = _grouped_linear(h_RF, self.down_proj, ends_E).masked_fill(nowhere_R, 0.0)
    weights_R = top_k_weights.flatten()[order_R].to(y_RD.dtype)
    sums_TD = torch.zeros_like(hidden_states, dtype=y_RD.dtype).index_add_(0, tokens_R, y_RD * weights_R[:, None])
    return sums_TD.to(hidden_states.dtype)


ExpertsInterface.register(NAME, tapped_experts_forward)
