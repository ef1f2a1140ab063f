"""The `memcpy` experts implementation for any MoE model of transformers: our moves around torch's grouped products.

Shapes: T tokens, K experts that a token takes, E experts, H hidden size, R rows in the order of experts.

Importing this module, as `import moe_backbone` does, registers the name, so that any model whose experts go through
transformers' interface takes it: `from_pretrained(..., experts_implementation="memcpy")`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import (
    ExpertsInterface,
    _grouped_linear,
    _grouped_mm,
)

from otpo_kernels.memcpy import permute, route, unpermute

NAME = "memcpy"

_BIAS_ROWS = 8  # 16 bytes of bfloat16, the least stride that grouped products take


def memcpy_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum over a token's experts, as the forward of an experts module of transformers.

    Gated or not, with biases, transposed or interleaved weights and a norm after the experts: each as the module's
    flags say. An index of `num_experts` stands for an expert that another process holds, and adds nothing. A
    few tokens, as in decoding, take the same way: on an H100 it is faster than transformers' `batched_mm` from one
    token on.

    Args:
        self: The experts module, an `nn.Module` decorated by `use_experts_implementation`.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)`, experts of each token.
        top_k_weights: `(T, K)`.

    Raises:
        TypeError: The experts' weights are quantized.
    """
    weight = self.gate_up_proj if self.has_gate else self.up_proj
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise TypeError(
            f"experts_implementation='{NAME}' multiplies floating-point weights of 16 bits and more, and "
            f"{type(self).__name__} holds {weight.dtype}; load the model without quantization of its experts, or "
            "with another experts_implementation."
        )
    routing = route(top_k_index, self.num_experts)
    rows = permute(hidden_states.to(weight.dtype), routing)
    rows = _linear(self, "gate_up_proj" if self.has_gate else "up_proj", rows, routing.offsets)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _linear(self, "down_proj", rows, routing.offsets)
    norm = self._modules.get("post_expert_norm")
    if norm is not None:
        # A grouped product leaves the rows after the last group as it found them, and the norm's gradient sums all.
        beyond = torch.arange(len(rows), device=rows.device) >= routing.offsets[-1]
        rows = norm(rows.masked_fill(beyond[:, None], 0.0))
    return unpermute(rows, routing, top_k_weights).to(hidden_states.dtype)


def _linear(experts: Any, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Each group's rows times its expert's weight, plus its bias."""
    product = _grouped_linear(rows, getattr(experts, name), offsets, is_transposed=experts.is_transposed)
    if not experts.has_bias:
        return product
    # As a product with ones: its gradient sums each group in one pass, in a fixed order, and no row past the groups.
    bias = getattr(experts, f"{name}_bias")
    ones = rows.new_ones(len(rows), _BIAS_ROWS)
    return product + _grouped_mm(ones, nn.functional.pad(bias[:, None], (0, 0, 0, _BIAS_ROWS - 1)), offsets)


ExpertsInterface.register(NAME, memcpy_experts_forward)
