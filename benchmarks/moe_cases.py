"""What the benchmarks of MoE layers share: the rivals' ways to move rows, problems with references, routings.

Shapes: T tokens, H hidden size, E experts, K slots of a token, N = T * K slots in all, R rows in the order of experts.

Every way to move rows routes, permutes and unpermutes; what its `route` returns is its own affair and goes to the
other two. Rivals are called as their owners call them; what they can compute ahead of the moves is in their `route`.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from otpo_kernels.memcpy import permute, route, unpermute

OPERATIONS = ("route", "permute", "unpermute", "permute backward", "unpermute backward", "whole")


class Shape(NamedTuple):
    """Sizes of a layer: T, H, E, K."""

    name: str
    tokens: int
    hidden: int
    experts: int
    slots: int

    @property
    def columns(self) -> dict[str, Any]:
        """As in the CSV."""
        return {"shape": self.name, **dict(zip(self._fields[1:], self[1:], strict=True))}


class Layout(NamedTuple):
    """Where rows went: `(T, K)` the row of each slot, `(E,)` the row after each group's last, and R."""

    destinations: Tensor
    ends: Tensor
    rows: int


class Memcpy:
    """Ours."""

    name = "memcpy"

    def route(self, index: Tensor, experts: int) -> Any:
        return route(index, experts)

    def layout(self, plan: Any) -> Layout:
        return Layout(plan.destinations.long(), plan.offsets.long(), plan.rows)

    def permute(self, x: Tensor, plan: Any) -> Tensor:
        return permute(x, plan)

    def unpermute(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        return unpermute(rows, plan, weights)


class TorchGather:
    """A stable sort, `index_select`, and for the way back a gather, a product and a sum."""

    name = "torch gather"

    def route(self, index: Tensor, experts: int) -> Any:
        of_row, order = index.flatten().sort(stable=True)
        ends = torch.searchsorted(of_row, torch.arange(experts, device=index.device), right=True, out_int32=True)
        return order, order // index.size(1), _inverse(order), ends

    def layout(self, plan: Any) -> Layout:
        order, token, inverse, ends = plan
        return Layout(inverse.view(int(token.max()) + 1, -1), ends.long(), len(order))

    def permute(self, x: Tensor, plan: Any) -> Tensor:
        return x.index_select(0, plan[1])

    def unpermute(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        gathered = rows.index_select(0, plan[2]).view(*weights.shape, -1)
        return (gathered * weights[:, :, None]).sum(1).to(rows.dtype)


class TorchIndexAdd(TorchGather):
    """The same, but the way back adds weighted rows into float32 zeros."""

    name = "torch index_add"

    def unpermute(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        order, token, *_ = plan
        weighted = rows * weights.flatten()[order][:, None]
        zeros = torch.zeros(len(weights), rows.size(1), dtype=weighted.dtype, device=rows.device)
        return zeros.index_add(0, token, weighted).to(rows.dtype)


class Transformers:
    """The moves in transformers' `grouped_mm_experts_forward`, without its masks for expert parallelism."""

    name = "transformers"

    def route(self, index: Tensor, experts: int) -> Any:
        of_row, order = torch.sort(index.flatten())
        # As there: CUDA's histc is deterministic for integers alone, the CPU's takes none.
        counts = torch.histc(of_row.int() if index.is_cuda else of_row.float(), experts, 0, experts - 1)
        return order, order // index.size(1), _inverse(order), torch.cumsum(counts, 0, dtype=torch.int32)

    def layout(self, plan: Any) -> Layout:
        return TorchGather().layout(plan)

    def permute(self, x: Tensor, plan: Any) -> Tensor:
        return x[plan[1]]

    def unpermute(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        order, _, inverse, _ = plan
        weighted = rows * weights.reshape(-1)[order].unsqueeze(-1)
        return weighted[inverse].view(*weights.shape, rows.size(1)).sum(dim=1).to(rows.dtype)


class DeepSpeed:
    """The steps of DeepSpeed's AutoEP layer on one rank with its fused combine; groups are padded to 8 rows."""

    name = "deepspeed"

    def __init__(self) -> None:
        self.count = import_module("deepspeed.moe.ep_count")
        self.kernels = import_module("deepspeed.moe.ep_kernels")
        self.fused = import_module("deepspeed.ops.triton_ops.autoep_fused_token_ops")

    def route(self, index: Tensor, experts: int) -> Any:
        align = self.kernels.TOKEN_GROUP_ALIGN_SIZE_M
        order = torch.argsort(index.flatten(), stable=True)
        counts = self.count.count_tokens_per_expert(index, experts)
        reserved = -(-(index.numel() + experts * align) // align) * align
        padded, _, ends = self.kernels.generate_permute_indices(counts, experts, 1, reserved, align)
        return order, order // index.size(1), padded, ends, index.size(1)

    def layout(self, plan: Any) -> Layout:
        order, _, padded, ends, slots = plan
        destinations = torch.empty_like(order)
        destinations[order] = self.kernels.inverse_permutation(padded, len(order))
        return Layout(destinations.view(-1, slots), ends.long(), len(padded))

    def permute(self, x: Tensor, plan: Any) -> Tensor:
        return self.kernels.permute_rows(x[plan[1]], plan[2])

    def unpermute(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        return self._combine(self.kernels.unpermute_rows(rows, plan[2], len(plan[0])), plan, weights)

    def _combine(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        tokens, slots = weights.shape
        return self.fused.fused_weighted_restore(rows, weights, plan[0], slots, (1, tokens, rows.size(1)))[0]


class DeepSpeedKernels(DeepSpeed):
    """DeepSpeed's kernels without padding, as no layer of it uses them: fewer passes than its own steps.

    Its gather knows no autograd; where gradients are wanted, repeated rows go through its one-to-one permutation.
    """

    name = "deepspeed kernels"

    def route(self, index: Tensor, experts: int) -> Any:
        order = torch.argsort(index.flatten(), stable=True)
        ends = self.count.count_tokens_per_expert(index, experts).cumsum(0)
        return order, order // index.size(1), _inverse(order), ends

    def layout(self, plan: Any) -> Layout:
        return TorchGather().layout(plan)

    def permute(self, x: Tensor, plan: Any) -> Tensor:
        order, token, *_ = plan
        if not x.requires_grad:
            return self.kernels.gather_rows(x, token)
        return self.kernels.permute_rows(x.repeat_interleave(len(order) // len(x), 0), order)

    def unpermute(self, rows: Tensor, plan: Any, weights: Tensor) -> Tensor:
        return self._combine(rows, plan, weights)


MOVES = (Memcpy, TorchGather, TorchIndexAdd, Transformers, DeepSpeed, DeepSpeedKernels)


def random_routing(
    tokens: int, experts: int, slots: int, device: str, *, skewed: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`(T, K)` experts in int64 and weights that sum to one; drawn evenly, or `skewed` by 1 / rank (Zipf)."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.zeros(experts, device=device)
    if skewed:
        logits -= torch.arange(1, experts + 1, device=device).log()
    uniform = torch.rand(tokens, experts, device=device, generator=generator).clamp(1e-9, 1 - 1e-6)
    scores, index = (logits - (-uniform.log()).log()).topk(slots)  # Gumbel's trick: draws without replacement
    return index, scores.softmax(1).to(dtype)


class Problem(NamedTuple):
    """A router's choice and bfloat16 rows: `x` and `grad` `(T, H)`, `of_slots` `(T, K, H)` for rows by expert."""

    index: Tensor
    weights: Tensor
    x: Tensor
    grad: Tensor
    of_slots: Tensor
    experts: int


class Prepared(NamedTuple):
    """What to measure, and the worst error of its results."""

    run: Callable[[], Any]
    error: Callable[[Any], float]


def make_problem(shape: Shape, device: str = "cuda") -> Problem:
    index, weights = random_routing(shape.tokens, shape.experts, shape.slots, device)
    generator = torch.Generator(device).manual_seed(1)
    sizes = ((shape.tokens, shape.hidden),) * 2 + ((shape.tokens, shape.slots, shape.hidden),)
    x, grad, of_slots = (torch.randn(s, device=device, generator=generator, dtype=torch.bfloat16) for s in sizes)
    return Problem(index, weights, x, grad, of_slots, shape.experts)


def prepare(operation: str, moves: Any, problem: Problem) -> Prepared:
    """The operation on leaves of its own, so that graphs of one contender do not outlive it."""
    plan = moves.route(problem.index, problem.experts)
    where, _, reserved = moves.layout(plan)
    slots, grad = range(where.size(1)), problem.grad.double()
    x, weights = (leaf.clone().requires_grad_() for leaf in (problem.x, problem.weights))
    rows = x.new_full((reserved, x.size(1)), torch.nan)  # rows of no slot are not to be read
    rows[where.flatten()] = problem.of_slots.flatten(0, 1)
    rows.requires_grad_()

    def by_slot(got: Tensor, want: Callable[[int], Tensor]) -> float:
        return max(worst_error(got[where[:, slot]], want(slot)) for slot in slots)

    def total(of_slot: Callable[[int], Tensor]) -> Tensor:
        return sum(map(of_slot, slots), start=torch.zeros_like(grad))

    def row(slot: int) -> Tensor:
        return problem.of_slots[:, slot].double()

    def weight(slot: int) -> Tensor:
        return problem.weights[:, slot, None].double()

    if operation == "route":
        return Prepared(
            lambda: moves.route(problem.index, problem.experts),
            lambda got: route_error(moves.layout(got), problem.index),
        )
    if operation == "permute":
        return Prepared(
            lambda: moves.permute(problem.x, plan),
            lambda got: by_slot(got, lambda _: problem.x),
        )
    if operation == "unpermute":
        return Prepared(
            lambda: moves.unpermute(rows.detach(), plan, problem.weights),
            lambda got: worst_error(got, total(lambda slot: weight(slot) * row(slot))),
        )
    if operation == "permute backward":
        permuted = moves.permute(x, plan)
        return Prepared(
            lambda: torch.autograd.grad(permuted, x, rows.detach(), retain_graph=True),
            lambda got: worst_error(got[0], total(row)),
        )
    if operation == "unpermute backward":
        output = moves.unpermute(rows, plan, weights)
        return Prepared(
            lambda: torch.autograd.grad(output, (rows, weights), problem.grad, retain_graph=True),
            lambda got: max(
                by_slot(got[0], lambda slot: weight(slot) * grad),
                worst_error(got[1], torch.stack([(row(slot) * grad).sum(1) for slot in slots], 1)),
            ),
        )

    def whole() -> tuple[Tensor, ...]:
        output = moves.unpermute(moves.permute(x, plan), plan, weights)
        return output, *torch.autograd.grad(output, (x, weights), problem.grad)

    share = problem.weights.double().sum(1, keepdim=True)
    dot = (problem.x.double() * grad).sum(1, keepdim=True)
    return Prepared(
        whole,
        lambda got: max(
            worst_error(got[0], share * problem.x.double()),
            worst_error(got[1], share * grad),
            worst_error(got[2], dot.expand_as(problem.weights)),
        ),
    )


def route_error(layout: Layout, index: Tensor) -> float:
    """0 where each slot has a row of its own within its expert's group, else infinite."""
    where, ends, reserved = layout
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    inside = ((where >= begins[index]) & (where < ends[index])).all() and where.max() < reserved
    return 0.0 if inside and where.unique().numel() == where.numel() else torch.inf


def unmasked_experts_forward(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`grouped_mm` as transformers 5.18 and later run it: no masks where there is no expert parallelism."""
    moves = Transformers()
    plan = moves.route(index, experts.num_experts)
    rows = _grouped_linear(moves.permute(x, plan), experts.gate_up_proj, plan[-1])
    rows = _grouped_linear(experts._apply_gate(rows), experts.down_proj, plan[-1])
    return moves.unpermute(rows, plan, weights)


def worst_error(got: Tensor, want: Tensor) -> float:
    """The largest error of an element, relative to its size plus the root mean square of all; not finite: infinite."""
    want = want.double()
    error = (got.double() - want).abs() / (want.abs() + want.square().mean().sqrt() + 1e-30)
    return error.max().nan_to_num(math.inf, math.inf).item()


def row_error(got: Tensor, want: Tensor) -> float:
    """The worst row's distance, relative to the row's norm plus a tenth of the usual one; not finite: infinite.

    A row of a few elements can be near zero by chance, so there the whole usual norm is added.
    """
    got, want = got.flatten(0, -2), want.flatten(0, -2)
    usual = want.norm() / len(want) ** 0.5 * (0.1 if want.size(1) >= 64 else 1.0)
    worst = 0.0
    for part, exact in zip(got.split(2**16), want.split(2**16), strict=True):  # so that no whole tensor is upcast
        error = (part.float() - exact).norm(dim=1) / (exact.norm(dim=1) + usual + 1e-30)
        worst = max(worst, error.max().nan_to_num(torch.inf, torch.inf).item())
    return worst


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
