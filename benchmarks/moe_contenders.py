"""Who runs an experts module of transformers in `benchmarks/moe_layer.py`, each called as its owners call it.

Shapes: T tokens, H hidden size, K slots of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from benchmarks.moe_cases import unmasked_experts_forward
from otpo_kernels.memcpy import permute, unpermute
from otpo_kernels.routing import route

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
OURS, SEPARATE = "memcpy", "memcpy, separate passes"
BASE, UNMASKED, BATCHED = "grouped_mm", "grouped_mm unmasked", "batched_mm"
STAND_IN = (UNMASKED,) if Version(transformers.__version__) < Version("5.18") else ()
TRAINING = (OURS, SEPARATE, BASE, *STAND_IN, BATCHED, "eager", "liger", "sonic")
DECODING = (OURS, BASE, *STAND_IN, BATCHED)


def by_name(name: str) -> Forward:
    """The forward that the module's own dispatch finds under this name."""

    def forward(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        experts.config._experts_implementation = name
        return experts(x, index, weights)

    return forward


def liger(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Liger-Kernel's function on the same parameters; it wants indices in int32."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    return LigerFusedMoEFunction.apply(x, experts.gate_up_proj, experts.down_proj, index.int(), weights)


def sonic(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """SonicMoE's function on the same parameters (arXiv 2512.14080), of PyPI's `sonic-moe`."""
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    tokens = torch.arange(len(index), device=x.device, dtype=torch.int32).repeat_interleave(index.size(1))
    stream, infers = torch.cuda.current_stream().cuda_stream, not torch.is_grad_enabled()
    up, down = (weight.permute(1, 2, 0) for weight in (experts.gate_up_proj, experts.down_proj))
    ways = (weights.flatten(), tokens, index.flatten().int(), up, None, down, None, experts.num_experts, stream)
    return moe_general_routing_inputs(x, *ways, ActivationType.SWIGLU, infers, concat_layout=True)[0]


def separate_passes(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Our moves around products, activation and their gradients that are all torch's own operations."""
    routing = route(index, experts.num_experts)
    rows = _grouped_linear(permute(x, routing), experts.gate_up_proj, routing.offsets)
    rows = _grouped_linear(experts._apply_gate(rows), experts.down_proj, routing.offsets)
    return unpermute(rows, routing, weights)


def compiled(name: str) -> Forward:
    """The module compiled by torch as one graph, run by what the dispatch finds under this name."""
    layer = torch.compile(lambda experts, *inputs: experts(*inputs), dynamic=False, fullgraph=True)

    def forward(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        experts.config._experts_implementation = name
        with torch._dynamo.config.patch(recompile_limit=64):  # one for each shape, with gradients and without
            return layer(experts, x, index, weights)

    return forward


CONTENDERS: dict[str, Forward] = {
    OURS: by_name("memcpy"),
    SEPARATE: separate_passes,
    BASE: by_name("grouped_mm"),
    UNMASKED: unmasked_experts_forward,
    BATCHED: by_name("batched_mm"),
    "eager": by_name("eager"),
    "liger": liger,
    "sonic": sonic,
    "memcpy compiled": compiled("memcpy"),
}
ONE_BY_ONE = tuple(name for name in CONTENDERS if name not in (*TRAINING, UNMASKED))
"""Who runs only where it is named."""
