"""The `memcpy` experts implementation for any MoE model of transformers: our moves around torch's grouped products.

Shapes: T tokens, K slots of a token, R = T * K rows grouped by expert, E experts, D hidden size, F the experts' width.
A tensor's suffix is its shape.

Importing this module, as `import moe_backbone` does, registers the name, so that any model whose experts go through
transformers' interface takes it: `from_pretrained(..., experts_implementation="memcpy")`. Without the option a model,
Compass too, has transformers' default, `grouped_mm`. [`experts_choice`] says where `memcpy` is the better one, and the
training commands of otpo go by that.

SwiGLU experts in bfloat16 on a GPU run as one operator, [`otpo_kernels.gated_experts`]; all others, and compiled
ones, run in separate passes, of which SwiGLU with the routers' weights is one, and so are its gradients. The kind of
module, its weights and whether torch compiles it decide that, and no data does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import (
    ExpertsInterface,
    _default_apply_gate,
    _grouped_linear,
    _grouped_mm,
)

from otpo_kernels.gated_experts import gated_experts
from otpo_kernels.memcpy import Routing, permute, route, unpermute
from otpo_kernels.swiglu import swiglu
from otpo_kernels.weighted_swiglu import weighted_swiglu

NAME = "memcpy"
ADAPTERS = "low_rank_adapters"
"""Attribute of an experts module with what adds to its products: each has the name of its `tensor`, and is called with
rows and the ends of their groups. An adapter of spread experts sets it for a forward (`expert_parallel/adapters`)."""

_SILU = ("SiLU", "SiLUActivation")
_PLAIN = (nn.Parameter, Tensor)  # a subclass, quantized say, has grouped products of its own
_BIAS_ROWS = 8  # 16 bytes of bfloat16, the least stride that grouped products take


def memcpy_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum over a token's experts, as the forward of an experts module of transformers.

    The module's flags say whether experts have a gate, biases, transposed or interleaved weights and a norm after
    them; all of these are covered. An index of `num_experts` stands for an expert that another process holds, and adds
    nothing. A few tokens, as in decoding, take the same way: on an H100 it is faster than transformers' `batched_mm`
    from one token on.

    Args:
        self: The experts module, an `nn.Module` decorated by `use_experts_implementation`.
        hidden_states: `(T, D)`.
        top_k_index: Experts of each token `(T, K)`.
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
    # In compiled layers separate passes were about as fast as the operator, and what it would hold is freed.
    if not torch.compiler.is_compiling() and is_swiglu(self) and _has_kernels(weight, self.down_proj):
        x_TD = hidden_states.to(weight.dtype)
        return gated_experts(x_TD, weight, self.down_proj, routing, top_k_weights).to(hidden_states.dtype)
    return _run_separately(self, hidden_states.to(weight.dtype), routing, top_k_weights).to(hidden_states.dtype)


def is_swiglu(experts: Any) -> bool:
    """Whether experts are `(silu(x Wg) * x Wu) Wd` and nothing more, `[Wg, Wu]` in one tensor.

    Args:
        experts: An `nn.Module` decorated by `use_experts_implementation`.
    """
    return (
        _gates_by_swiglu(experts)
        and not experts.has_bias
        and not experts.is_transposed
        and experts._modules.get("post_expert_norm") is None
        and not vars(experts).get(ADAPTERS)
    )


def _gates_by_swiglu(experts: Any) -> bool:
    """Whether what lies between both products is `silu(gate) * up` of the halves of a row."""
    return (
        experts.has_gate
        and experts.is_concatenated
        and type(experts)._apply_gate is _default_apply_gate
        and type(experts.act_fn).__name__ in _SILU
    )


def _weighs_rows_before_the_product(experts: Any) -> bool:
    """Whether a row may be multiplied by its router's weight before the last product, and not after it.

    Nothing but a plain product may come after: a bias and a norm are not linear, and a quantized weight may scale its
    input by the largest row. Weighted rows of float16 could leave its range, where routers' weights are far from 1.
    """
    return (
        not experts.has_bias
        and experts._modules.get("post_expert_norm") is None
        and type(experts.down_proj) in _PLAIN
        and experts.down_proj.dtype != torch.float16
    )


def _has_kernels(*weights: Tensor) -> bool:
    """Whether torch's grouped products and our kernels run plain weights of that dtype on that device."""
    return all(
        type(weight) in _PLAIN
        and weight.is_cuda
        and weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.is_contiguous()
        and not any(size % 8 for size in weight.shape[1:])  # 16 bytes, which torch's products ask for
        for weight in weights
    )


def _run_separately(experts: Any, x_TD: Tensor, routing: Routing, weights_TK: Tensor) -> Tensor:
    """Each token's rows through its experts in separate passes, and their weighted sum, `(T, D)`."""
    ends_E, norm = routing.offsets, experts._modules.get("post_expert_norm")
    h_RF = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", permute(x_TD, routing), ends_E)

    weights_of_sum: Tensor | None = weights_TK
    if not _gates_by_swiglu(experts):
        h_RF = experts._apply_gate(h_RF) if experts.has_gate else experts.act_fn(h_RF)
    elif _weighs_rows_before_the_product(experts):
        h_RF, weights_of_sum = weighted_swiglu(h_RF, weights_TK, routing), None
    else:
        h_RF = swiglu(h_RF, ends_E)

    y_RD = _linear(experts, "down_proj", h_RF, ends_E)
    if norm is not None:
        # A grouped product leaves the rows after the last group as it found them, and the norm's gradient sums all.
        beyond_R = torch.arange(len(y_RD), device=y_RD.device) >= ends_E[-1]
        y_RD = norm(y_RD.masked_fill(beyond_R[:, None], 0.0))
    return unpermute(y_RD, routing, weights_of_sum)


def _linear(experts: Any, name: str, rows: Tensor, ends_E: Tensor) -> Tensor:
    """Each group's rows times its expert's weight, plus its bias."""
    product = _grouped_linear(rows, getattr(experts, name), ends_E, is_transposed=experts.is_transposed)
    for adapter in vars(experts).get(ADAPTERS, ()):
        if adapter.tensor == name:
            product = product + adapter(rows, ends_E)
    if not experts.has_bias:
        return product
    # The bias is added as a product with ones. Its gradient sums each group in one pass, in a fixed order, and leaves
    # out the rows after the last group.
    bias = getattr(experts, f"{name}_bias")
    ones = rows.new_ones(len(rows), _BIAS_ROWS)
    return product + _grouped_mm(ones, nn.functional.pad(bias[:, None], (0, 0, 0, _BIAS_ROWS - 1)), ends_E)


ExpertsInterface.register(NAME, memcpy_experts_forward)
