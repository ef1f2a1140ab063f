"""The layer that DeepSpeed trains in place of a block's experts: it holds this process's part of them.

Shapes: T tokens of this process, K slots of a token, N rows that it receives, W processes that share the experts, E
experts, e = E / W experts of each process, D hidden size, F the experts' width. A tensor's suffix is its shape.

DeepSpeed replaces the experts alone. Router, its losses, its biases and shared experts stay the model's own. A row's
trip through the layer is that of `exchange`, or of `gather`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

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
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_repack import repack_expert_requires_grad_flags, repack_expert_weights
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from .capacity import AgreedCapacity
from .exchange import ExpertGroup, run_by_expert, run_spread_experts
from .gather import Gathering, remember_group, run_gathered_experts

if TYPE_CHECKING:  # PEFT is needed where there are adapters alone
    from .adapters import LowRank

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""transformers' names of gate and up projections `(E, 2F, D)` and of down projections `(E, D, F)`."""
WEIGHTS = ("w1", "w2", "w3")
"""DeepSpeed's names of gate `(e, F, D)`, down `(e, D, F)` and up projections `(e, F, D)`, in memory and on disk."""


# Numbers of rows come to the host on the way, which no graph can have. So compiled layers are cut here in evaluation.
_send_rows: Any = torch.compiler.disable(run_spread_experts)


class LocalExperts(nn.Module):
    """The experts of this process, in a module of their own so that ZeRO-3 fetches their weights when it runs.

    Args:
        weights: Those of [`WEIGHTS`].
        trained: Whether each of them is trained.
        act_fn: What the gate goes through.
    """

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor], trained: tuple[bool, bool, bool], act_fn: nn.Module):
        super().__init__()
        for name, weight, train in zip(WEIGHTS, weights, trained, strict=True):
            setattr(self, name, nn.Parameter(weight.contiguous(), requires_grad=train))
        self.act_fn = act_fn

    def forward(self, x_ND: Tensor, ends_e: Tensor, adapters: Sequence["LowRank"] = ()) -> Tensor:
        """Each group of rows through its expert.

        Args:
            x_ND: Rows grouped by expert `(N, D)`.
            ends_e: The row after each group's last `(e,)` int32.
            adapters: What adds to the products, under the names that transformers gives the tensors.

        Returns:
            `(N, D)`.
        """
        gate_NF, up_NF = _grouped_linear(x_ND, self.w1, ends_e), _grouped_linear(x_ND, self.w3, ends_e)
        for adapter in adapters:
            if adapter.tensor == GATE_UP:
                more_gate_NF, more_up_NF = adapter(x_ND, ends_e).chunk(2, dim=-1)
                gate_NF, up_NF = gate_NF + more_gate_NF, up_NF + more_up_NF
        h_NF = self.act_fn(gate_NF) * up_NF
        y_ND = _grouped_linear(h_NF, self.w2, ends_e)
        for adapter in adapters:
            if adapter.tensor == DOWN:
                y_ND = y_ND + adapter(h_NF, ends_e)
        return y_ND


class ParallelExperts(AutoEPMoELayer):
    """Stands in place of a block's experts; the block calls it as it called them.

    DeepSpeed finds its expert-parallel layers, for gradients, ZeRO and checkpoints, by their class. So this class is
    one of theirs. It takes the binding of the process group from its parent, and has `__init__` and `forward` of its
    own.

    Args:
        experts: The experts module of transformers that the layer replaces, whole, or partitioned by ZeRO-3.
        spec: What DeepSpeed's parser found of the block.
        ep_size: W.
        ep_rank: Which part of the experts this process holds.
    """

    experts: LocalExperts
    gathering: Gathering | None = None
    """How all tokens are gathered; None sends each row to its expert."""
    agreed: AgreedCapacity | None = None
    """C of each pass, in evaluation too; None where it is that of `gathering`, and training alone gathers."""

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
            self.mark(parameter)
            self._tell_placement(parameter)

    def mark(self, parameter: Any) -> None:
        """Marks a parameter as DeepSpeed wants those marked that differ between the processes of a group."""
        parameter.allreduce = False
        parameter.group_name = parameter.ds_zero_partition_group_name = self.ep_group_name
        parameter.ds_zero_placement_family = "autoep_expert"

    def _tell_placement(self, parameter: Any) -> None:
        """Says of one of [`WEIGHTS`] which experts it holds, for DeepSpeed's checkpoints."""
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

    def gather(self, capacity: int | AgreedCapacity) -> None:
        """Has all tokens gathered from now on, see [`gather`]; DeepSpeed must have set the layer's group.

        Args:
            capacity: The most tokens of a batch in any process, the same in all, for training alone; or what the
                processes agree on before each pass, which serves every pass, so evaluation gathers too.
        """
        assert self.ep_group is not None
        self.agreed = None if isinstance(capacity, int) else capacity
        name, most = remember_group(self.ep_group), capacity if isinstance(capacity, int) else 0
        self.gathering = Gathering(name, self.ep_size, self.ep_rank, self.num_local_experts, most)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Sequence["LowRank"] = (),
    ) -> Tensor:
        """Weighted sum over a token's experts, wherever they are.

        Args:
            hidden_states: `(T, D)`; T may differ between processes, and be zero.
            top_k_index: Experts of each token `(T, K)`, in `[0, E)`.
            top_k_weights: `(T, K)`.
            adapters: Of the experts of this process, which PEFT's wrappers around the layer pass on.
        """
        experts = ExpertGroup(self.ep_group, self.ep_size, self.num_local_experts)
        x_TD = hidden_states.to(self.experts.w1.dtype)
        run_sorted = partial(self.experts, adapters=adapters)
        if self.gathering is not None and (self.training or self.agreed is not None):
            gathering = self.gathering
            if self.agreed is not None:
                gathering = gathering._replace(capacity=self.agreed.tokens)
            y_TD = run_gathered_experts(x_TD, top_k_index, top_k_weights, gathering, run_sorted)
            return y_TD.to(hidden_states.dtype)

        def run_arrived(x_ND: Tensor, arrived_We: Tensor) -> Tensor:
            return run_by_expert(x_ND, arrived_We, run_sorted)

        y_TD = _send_rows(x_TD, top_k_index, top_k_weights, experts, run_arrived)
        return y_TD.to(hidden_states.dtype)


def parallel_experts(model: nn.Module) -> Iterator[tuple[str, ParallelExperts]]:
    """Names and modules of the expert-parallel layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, ParallelExperts):
            yield name, module
