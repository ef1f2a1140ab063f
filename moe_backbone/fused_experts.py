"""The `fused` experts implementation for MoE models of transformers: SwiGLU, moves and products in few passes.

For experts with concatenated gate and up projections, SiLU, no biases and bfloat16 weights, on a GPU of compute
capability 9. [`why_not_fused`] says what else keeps it from running, and `memcpy` runs all of that. It keeps neither
gathered rows nor experts' outputs for the backward: see [`otpo_kernels.grouped_product`].
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from otpo_kernels.grouped_product import NONE, gated_experts
from otpo_kernels.routing import route

from .memcpy_experts import ADAPTERS

FUSED = "fused"
FUSIONS = NONE
"""The products that our kernels run; the others are torch's."""

_SILU = ("SiLU", "SiLUActivation")


def why_not_fused(experts: Any) -> str | None:
    """What of an experts module keeps `fused` from running it, its device and dtype aside; None for nothing.

    Args:
        experts: An `nn.Module` decorated by `use_experts_implementation`.
    """
    kind = type(experts).__name__
    if not experts.has_gate:
        return f"{kind} has no gate"
    if experts.has_bias:
        return f"{kind} has biases"
    if experts.is_transposed or not experts.is_concatenated:
        return f"the weights of {kind} are transposed or interleaved"
    if experts._modules.get("post_expert_norm") is not None:
        return f"{kind} has a norm after its experts"
    if type(experts)._apply_gate is not _default_apply_gate or type(experts.act_fn).__name__ not in _SILU:
        return f"the activation of {kind} is not SwiGLU"
    if vars(experts).get(ADAPTERS):
        return f"adapters add to the products of {kind}"
    return None


def fused_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum over a token's experts, as the forward of an experts module of transformers.

    Args:
        self: The experts module, an `nn.Module` decorated by `use_experts_implementation`.
        hidden_states: `(T, D)`.
        top_k_index: Experts of each token `(T, K)`; `num_experts` for an expert that another process holds.
        top_k_weights: `(T, K)`.

    Raises:
        ValueError: The module is of another kind than `fused` runs.
    """
    reason = why_not_fused(self)
    if reason is None and self.gate_up_proj.is_cuda and self.gate_up_proj.dtype != torch.bfloat16:
        reason = f"the weights of {type(self).__name__} are {self.gate_up_proj.dtype}, not bfloat16"
    if reason is not None:
        raise ValueError(f"experts_implementation='{FUSED}': {reason}. Set experts_implementation='memcpy'.")
    x = hidden_states.to(self.gate_up_proj.dtype)
    routing = route(top_k_index, self.num_experts)
    return gated_experts(x, self.gate_up_proj, self.down_proj, routing, top_k_weights, FUSIONS).to(hidden_states.dtype)


ExpertsInterface.register(FUSED, fused_experts_forward)
