"""Experts spread over the processes of a group: the layer that DeepSpeed trains, with our row moves in it.

Shapes: T tokens, K experts that a token takes, E experts, P processes of the group, L = E / P experts of each,
H hidden size, I their width, N rows that this process receives.

A token's rows go to the experts' processes and back by two all-to-alls. `permute` groups the rows by expert, and so
by process; what arrives stands by source and then by expert, and `reorder` groups it by expert; `unpermute` goes both
ways back, the second time with the router's weights. One wait for the host: the sizes of what is exchanged.

Only the experts are replaced. Router, its losses, its biases and shared experts stay the model's own.
"""

from collections.abc import Iterator
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_config import MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV
from deepspeed.moe.ep_repack import repack_expert_requires_grad_flags, repack_expert_weights
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.integrations.moe import _grouped_linear

from otpo_kernels.memcpy import permute, reorder, route, unpermute

WEIGHTS = ("w1", "w2", "w3")
"""Names of gate, down and up projections in the layout that DeepSpeed saves: `[L, I, H]`, `[L, H, I]`, `[L, I, H]`."""


class LocalExperts(nn.Module):
    """The experts of this process; a module of its own so that ZeRO-3 fetches its weights when it runs."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor], trained: tuple[bool, bool, bool], act_fn: nn.Module):
        super().__init__()
        for name, weight, train in zip(WEIGHTS, weights, trained, strict=True):
            setattr(self, name, nn.Parameter(weight.contiguous(), requires_grad=train))
        self.act_fn = act_fn

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """`[N, H]` to `[N, H]`, the rows grouped by expert, groups ending at `offsets` `[L]`."""
        gate, up = _grouped_linear(rows, self.w1, offsets), _grouped_linear(rows, self.w3, offsets)
        return _grouped_linear(self.act_fn(gate) * up, self.w2, offsets)


class ParallelExperts(AutoEPMoELayer):
    """In place of a block's experts, called as they were.

    DeepSpeed finds its expert-parallel layers, for gradients, ZeRO and checkpoints, by their class. So this is one of
    them; of the parent it takes the binding of the process group and nothing of its forward.

    Args:
        experts: The experts module of transformers that it replaces, whole, or partitioned by ZeRO-3.
        spec: What DeepSpeed's parser found of the block.
        ep_size: P.
        ep_rank: Which part of the experts this process has.
    """

    experts: LocalExperts

    def __init__(self, experts: nn.Module, spec: MoELayerSpec, ep_size: int, ep_rank: int):
        nn.Module.__init__(self)
        self.num_experts, self.num_local_experts = spec.num_experts, spec.num_experts // ep_size
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.ep_group_name, self.ep_group = f"ep_size_{ep_size}", None
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, ep_size
        )
        weights = repack_expert_weights(experts, spec, ep_rank, ep_size)
        trained = repack_expert_requires_grad_flags(experts, spec, ep_rank, ep_size)
        self.experts = LocalExperts(weights, trained, experts.act_fn)  # pyright: ignore[reportArgumentType]
        for parameter in self.experts.parameters():
            self._mark(parameter)

    def _mark(self, parameter: Any) -> None:
        """As DeepSpeed wants parameters marked that differ between the processes of a group."""
        parameter.allreduce = False
        parameter.group_name = parameter.ds_zero_partition_group_name = self.ep_group_name
        parameter.ds_zero_placement_family = "autoep_expert"
        logical_shape = [self.num_experts, *parameter.shape[1:]]
        placement = self.expert_placement_descriptor
        meta = {
            AUTOEP_EXPERT_PLACEMENT: placement,
            AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
            AUTOEP_PARAM_EP_RANK: self.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
        }
        setattr(parameter, DS_AUTOEP_UC_META, meta)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over a token's experts, wherever they are.

        Args:
            hidden_states: `[T, H]`; T may differ between processes, and be zero.
            top_k_index: Experts `[T, K]`, in `[0, E)`.
            top_k_weights: `[T, K]`.
        """
        dtype = self.experts.w1.dtype
        with record_function("otpo::memcpy"):
            routing = route(top_k_index, self.num_experts)
            rows = permute(hidden_states.to(dtype), routing)
        if self.ep_size == 1:
            rows = self.experts(rows, routing.offsets)
        else:
            rows = self._through_the_group(rows, routing.counts)
        with record_function("otpo::memcpy"):
            return unpermute(rows, routing, top_k_weights).to(hidden_states.dtype)

    def _through_the_group(self, rows: Tensor, counts: Tensor) -> Tensor:
        sent = counts.view(self.ep_size, self.num_local_experts)
        received = torch.empty_like(sent)
        with record_function("otpo::all_to_all"):
            dist.all_to_all_single(received, sent, group=self.ep_group)
            sizes = torch.stack([sent.sum(1), received.sum(1)]).tolist()
            rows = _AllToAllV.apply(self.ep_group, rows, *sizes)
        with record_function("otpo::memcpy"):
            rows, local = reorder(rows, received)
        rows = self.experts(rows, local.offsets)
        with record_function("otpo::memcpy"):
            rows = unpermute(rows, local)
        with record_function("otpo::all_to_all"):
            return _AllToAllV.apply(self.ep_group, rows, *reversed(sizes))


def parallel_experts(model: nn.Module) -> Iterator[tuple[str, ParallelExperts]]:
    """Names and modules of the expert-parallel layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, ParallelExperts):
            yield name, module
