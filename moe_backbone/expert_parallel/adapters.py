"""PEFT's adapters of spread experts: each process holds those of its own experts, and adds them by grouped products.

Shapes: N rows grouped by expert, E experts, e of this process, r rank, I numbers of a row that goes in, O of one that
comes out. A tensor's suffix is its shape.

For `target_parameters`, PEFT wraps a module of experts in a `ParamWrapper` for each tensor, one around the other, and
keeps the factors of all experts in two linear layers: A `(E * r, I)`, expert by expert, and B `(O, r * E)`, in which
the expert changes fastest. PEFT adds their product to the tensor before each forward. Spread, the same two layers hold
the factors of e experts in the same order, and a row goes through them beside the tensor, which is left as it is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from .adapter_files import AdapterSize

TENSORS = ("gate_up_proj", "down_proj")
"""Tensors of experts that may have an adapter, by transformers' names, in the order in which a row meets them."""
_ROW_BYTES = 16  # rows of torch's grouped products are whole multiples of this


class LowRank(NamedTuple):
    """One adapter of one tensor of the experts.

    Attributes:
        tensor: `gate_up_proj` or `down_proj`.
        down: A, a module that takes rows and the ends of their groups.
        up: B, likewise.
        scaling: What the product is multiplied by.
    """

    tensor: str
    down: "FactorA"
    up: "FactorB"
    scaling: float

    def __call__(self, x_NI: Tensor, ends_e: Tensor) -> Tensor:
        """What the adapter adds to the tensor's own product with rows: `(N, O)`, in their dtype.

        Args:
            x_NI: Rows grouped by expert.
            ends_e: The row after each group's last, int32.
        """
        return (self.up(self.down(x_NI, ends_e), ends_e) * self.scaling).to(x_NI.dtype)


class _Factor(nn.Module):
    """A factor of the experts of this process; a module so that ZeRO-3 fetches it as it runs.

    Args:
        weight: Of those experts.
        experts: e.
    """

    def __init__(self, weight: nn.Parameter, experts: int):
        super().__init__()
        self.weight, self.experts = weight, experts

    def local_weight(self) -> Tensor:
        """The factor of the experts of this process."""
        return self.weight


class FactorA(_Factor):
    """Factor A, `weight` `(e * r, I)`."""

    @staticmethod
    def part(whole: Tensor, ep_size: int, ep_rank: int, experts: int) -> Tensor:
        """The part of a whole factor `(E * r, I)` that a process of `ep_size` holds."""
        return whole.chunk(ep_size)[ep_rank].clone()

    @staticmethod
    def join(parts: Sequence[Tensor], experts: int) -> Tensor:
        """The whole factor of its parts, in the order of their processes."""
        return torch.cat(list(parts))

    @staticmethod
    def whole_shape(part: Sequence[int], ep_size: int) -> tuple[int, int]:
        """The shape of the whole factor by that of a part."""
        return part[0] * ep_size, part[1]

    def forward(self, x_NI: Tensor, ends_e: Tensor) -> Tensor:
        """Rows of the rank, `(N, r)`, padded with zeros to a width that grouped products take."""
        weight = self.local_weight()
        a_erI = weight.reshape(self.experts, -1, weight.size(-1))
        a_erI = nn.functional.pad(a_erI, (0, 0, 0, _missing(a_erI.size(1), weight.element_size())))
        return _grouped_linear(x_NI.to(weight.dtype), a_erI, ends_e)


class FactorB(_Factor):
    """Factor B, `weight` `(O, r * e)`."""

    @staticmethod
    def part(whole: Tensor, ep_size: int, ep_rank: int, experts: int) -> Tensor:
        """The part of a whole factor `(O, r * E)` that a process of `ep_size` holds."""
        return whole.unflatten(1, (-1, ep_size, experts))[:, :, ep_rank].flatten(1).clone()

    @staticmethod
    def join(parts: Sequence[Tensor], experts: int) -> Tensor:
        """The whole factor of its parts, in the order of their processes."""
        return torch.stack([part.unflatten(1, (-1, experts)) for part in parts], 2).flatten(1)

    @staticmethod
    def whole_shape(part: Sequence[int], ep_size: int) -> tuple[int, int]:
        """The shape of the whole factor by that of a part."""
        return part[0], part[1] * ep_size

    def forward(self, x_Nr: Tensor, ends_e: Tensor) -> Tensor:
        """Rows that go out, `(N, O)`, from those of [`FactorA`]."""
        weight = self.local_weight()
        b_eOr = weight.reshape(weight.size(0), -1, self.experts).permute(2, 0, 1)
        b_eOr = nn.functional.pad(b_eOr, (0, x_Nr.size(1) - b_eOr.size(2)))
        return _grouped_linear(x_Nr, b_eOr.contiguous(), ends_e)


class SpreadAdapter(ParamWrapper):
    """A `ParamWrapper` of PEFT's around spread experts, in whose place it is put by [`spread_adapters`].

    It passes its factors on to the experts, which add their products. Names of tensors, which adapters are active,
    and whether they are switched off, as for a reference, stay PEFT's.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, *args: Any, adapters: tuple[LowRank, ...] = (), **kwargs: Any
    ) -> Tensor:
        """As the experts' forward, see [`ParallelExperts`](deepspeed_layer.ParallelExperts)."""
        return self.base_layer(x, *args, adapters=(*adapters, *self.active()), **kwargs)

    def active(self) -> Iterator[LowRank]:
        """The adapters that add to the experts now."""
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.lora_A:
                down: Any = self.lora_A[name]
                up: Any = self.lora_B[name]
                yield LowRank(self.parameter_name, down, up, self.scaling[name])

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises a `RuntimeError`: the experts of other processes are not here."""
        raise RuntimeError(
            "An adapter of spread experts can't be merged where they are spread. Save it (`save_model`), load it in "
            "one process (`PeftModel.from_pretrained`), and merge it there."
        )


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has the stacked tensors of experts itself, whatever it is called and whoever spreads them."""
    own = [getattr(module, "_parameters", {}).get(tensor) for tensor in TENSORS]
    # Under ZeRO-3 a tensor is empty while it is not fetched, and its shape is kept beside it.
    return all(tensor is not None and len(getattr(tensor, "ds_shape", tensor.shape)) == 3 for tensor in own)


def wrappers_around(module: nn.Module) -> Iterator[ParamWrapper]:
    """PEFT's wrappers around a module of experts, from the outermost inwards; none where it has no adapter."""
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer


def adapter_sizes(model: nn.Module) -> dict[str, AdapterSize]:
    """The sizes of a model's LoRA adapters that are trained, by the name of their module and their own.

    Args:
        model: A `PeftModel`, its experts spread or not: the names are the same.
    """
    return {
        f"{name}.{adapter}": AdapterSize(int(module.r[adapter]), float(scaling))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for adapter, scaling in module.scaling.items()
        if _is_trained(module, adapter)
    }


def _is_trained(layer: Any, adapter: str) -> bool:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight.requires_grad
    return adapter in layer.lora_embedding_A and layer.lora_embedding_A[adapter].requires_grad


def spread_adapters(experts: nn.Module, ep_size: int, ep_rank: int) -> list[nn.Parameter]:
    """Keeps the factors of this process's experts, in place, so that an optimizer made beforehand still has them.

    Args:
        experts: A module of experts, PEFT's wrappers around it.
        ep_size: Processes that share the experts.
        ep_rank: Which of them this one is.

    Returns:
        The factors, each of a part of the experts.
    """
    kept: list[nn.Parameter] = []
    for wrapper in wrappers_around(experts):
        wrapper.__class__ = SpreadAdapter
        wrapper.num_experts //= ep_size
        for layers, factor in ((wrapper.lora_A, FactorA), (wrapper.lora_B, FactorB)):
            for name, layer in list(layers.items()):
                weight: Any = layer.weight
                weight.data = factor.part(weight.data, ep_size, ep_rank, wrapper.num_experts)
                layers[name] = factor(weight, wrapper.num_experts)
                kept.append(weight)
    return kept


def _missing(rank: int, itemsize: int) -> int:
    """Columns that a rank lacks to be a row of grouped products."""
    return -rank % max(1, _ROW_BYTES // itemsize)
