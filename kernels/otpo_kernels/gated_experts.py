"""A layer of gated experts: row moves, torch's grouped products, and SwiGLU and its gradient in one pass each.

Shapes: T tokens, K slots of a token, R rows in the order of experts, E experts, D hidden size, F the experts' width.

    routing = route(top_k_index, num_experts)
    output = gated_experts(hidden_states, gate_up, down, routing, top_k_weights)  # (T, D)

For token t and its slots k, with h = x_t W1_e and a = silu(gate) * up of the halves of h:

    output_t = sum_k w_tk a_tk W2_e

The backward goes SonicMoE's way (arXiv 2512.14080). What it keeps is x, h and the routing, T D + 2 R F numbers:
neither gathered rows, nor a, nor the experts' outputs. With g_t the output's gradient and v_tk = g_t W2_e^T,

    dw_tk = a_tk . v_tk     dh_tk = w_tk dSwiGLU(h_tk, v_tk)     dx_t = sum_k dh_tk W1_e^T
    dW2_e = sum of (w_tk a_tk)^T g_t     dW1_e = sum of x_t^T dh_tk

so that the weights' gradient needs no output of an expert, and the weighted sum's backward is a plain gather.

Products that gather rows as they load them and compute SwiGLU as they store were tried in Triton: docs/performance.md
has what they reached. Gradients of gradients are not covered.
"""

from typing import Any

import torch
from torch import Tensor

from .memcpy import permute, unpermute
from .routing import Routing
from .swiglu import run_swiglu
from .weighted_swiglu import run_weighted_swiglu_backward, sources_of_rows


def gated_experts(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """Weighted sum of each token's gated experts.

    Args:
        x: `(T, D)`, of a dtype that torch's grouped products take: bfloat16, or float32 where there is no GPU.
        gate_up: `(E, 2 F, D)` in the dtype of `x`, the gate's rows first.
        down: `(E, D, F)` in the dtype of `x`.
        routing: Of the same tokens, without alignment.
        weights: `(T, K)`, any floating dtype. Their gradient is zero at dropped slots.

    Returns:
        `(T, D)` in the dtype of `x`.

    Raises:
        ValueError: A shape does not fit the others, or `routing` is padded.
        TypeError: Dtypes differ.
    """
    tokens, slots = routing.destinations.shape
    experts, doubled, hidden = gate_up.shape
    wanted = ((tokens, hidden), (experts, hidden, doubled // 2), (tokens, slots), (experts,))
    got = tuple(map(tuple, (x.shape, down.shape, weights.shape, routing.offsets.shape)))
    if doubled % 2 or got != wanted:
        raise ValueError(
            f"`gate_up` of shape {tuple(gate_up.shape)} and a routing of {tokens} tokens with {slots} slots ask for "
            f"x, down, weights and offsets of shapes {wanted}, got {got}."
        )
    if routing.rows != tokens * slots:
        raise ValueError(f"`routing` has {routing.rows} rows for {tokens * slots} slots; route with alignment=1.")
    if not x.dtype == gate_up.dtype == down.dtype:
        raise TypeError(f"x, gate_up and down must share a dtype, got {x.dtype}, {gate_up.dtype} and {down.dtype}.")
    where = (routing.destinations, routing.offsets, routing.counts)
    return _gated_experts(x, gate_up, down, weights, *where, torch.is_grad_enabled())[0]


@torch.library.custom_op("otpo::gated_experts", mutates_args=())
def _gated_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    destinations: Tensor,
    offsets: Tensor,
    counts: Tensor,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and `h` where `keeps` says so, else nothing of it."""
    routing = Routing(destinations, offsets, counts, destinations.numel())
    if not routing.rows:
        return torch.zeros_like(x), x.new_empty(0, gate_up.size(1))
    h = torch.nn.functional.grouped_mm(permute(x, routing), gate_up.transpose(1, 2), offs=offsets)
    a = run_swiglu(h, offsets)
    if not keeps:
        h = h.new_empty(0, h.size(1))
    y = torch.nn.functional.grouped_mm(a, down.transpose(1, 2), offs=offsets)
    return unpermute(y, routing, weights), h


@_gated_experts.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    destinations: Tensor,
    offsets: Tensor,
    counts: Tensor,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(destinations.numel() if keeps else 0, gate_up.size(1))


@torch.library.custom_op("otpo::gated_experts_backward", mutates_args=())
def _gated_experts_backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    h: Tensor,
    destinations: Tensor,
    offsets: Tensor,
    counts: Tensor,
    learns: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, `gate_up`, `down` and `weights`; empty where `learns` says of the second or third no."""
    routing = Routing(destinations, offsets, counts, destinations.numel())
    if not routing.rows:
        nothing = [torch.zeros_like(w) for w in (x, gate_up, down, weights)]
        return nothing[0], nothing[1], nothing[2], nothing[3]
    learns_gate_up, learns_down = learns
    sources = sources_of_rows(destinations, routing.rows)
    grouped_mm = torch.nn.functional.grouped_mm

    grad_rows = permute(grad, routing)
    grad_a = grouped_mm(grad_rows, down, offs=offsets)
    grad_h, grad_weights, weighted = run_weighted_swiglu_backward(grad_a, h, weights, sources, value=learns_down)
    del grad_a

    grad_down = grouped_mm(grad_rows.t(), weighted, offs=offsets) if learns_down else down.new_empty(0)
    del grad_rows, weighted
    grad_gate_up = gate_up.new_empty(0)
    if learns_gate_up:
        grad_gate_up = grouped_mm(grad_h.t(), permute(x, routing), offs=offsets)
    grad_x = unpermute(grouped_mm(grad_h, gate_up, offs=offsets), routing)
    return grad_x, grad_gate_up, grad_down, grad_weights


@_gated_experts_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    h: Tensor,
    destinations: Tensor,
    offsets: Tensor,
    counts: Tensor,
    learns: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_gate_up, grad_down = (
        w.new_empty(w.shape if needed else 0) for w, needed in zip((gate_up, down), learns, strict=True)
    )
    return x.new_empty(x.shape), grad_gate_up, grad_down, weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate_up, down, weights, *routing, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up, down, weights, output[1], *routing)


def _gradients(ctx: Any, grad: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    if grad_h is not None:
        raise RuntimeError("`h` of otpo::gated_experts is kept for its backward alone and has no gradient.")
    learns = [ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    grad_x, *learned, grad_weights = _gated_experts_backward(grad, *ctx.saved_tensors, learns)
    of_experts = (found if needed else None for found, needed in zip(learned, learns, strict=True))
    return grad_x, *of_experts, grad_weights, None, None, None, None


_gated_experts.register_autograd(_gradients, setup_context=_save)
