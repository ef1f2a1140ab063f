"""transformers' own expert parallelism (from 5.21 on), over FSDP2, with the trip of a row that DeepSpeed's layer has.

Shapes: T tokens of this process, K slots of a token, N rows that it receives, W processes that share the experts, e
experts of each process, D hidden size. A tensor's suffix is its shape.

transformers spreads the experts as it loads the model, `from_pretrained(..., distributed_config=...)`, and DeepSpeed
has no part in it. `deepspeed_config` is the other way.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface

from moe_backbone.memcpy_experts import NAME

from .exchange import ExpertGroup, run_spread_experts
from .sizes import describe_expert_parallel


def native_expert_parallel_options(ep_size: int, world_size: int) -> dict[str, Any]:
    """Options of `from_pretrained` that spread the experts over `ep_size` processes, and all else over all of them."""
    distributed = DistributedConfig(fsdp_size=world_size, ep_size=ep_size, ep_implementation=NAME)
    return {"distributed_config": distributed, "experts_implementation": NAME}


def require_native_expert_parallelism(model: nn.Module, ep_size: int) -> str:
    """Makes sure that transformers spread the experts of a model as was asked, and describes what runs.

    Raises:
        RuntimeError: They were not.
    """
    experts: list[Any] = [module for module in model.modules() if getattr(module, "_is_expert_parallel", False)]
    sizes = {len(module.gate_up_proj) // module.num_experts for module in experts}
    if sizes != {ep_size}:
        raise RuntimeError(
            f"Expert parallelism of {ep_size} was asked for, but transformers spread {len(experts)} layers, over "
            f"{sorted(sizes)} process(es)."
        )
    return describe_expert_parallel(ep_size, experts[0].num_experts, len(experts), "transformers' own, with FSDP2")


class MemcpyEP(AllToAllEP):
    """transformers' all-to-all, with our row moves in place of its sort, gather and scatter.

    A tensor-parallel group splits its batch as the parent class does, so the parent runs where there is one.
    """

    num_local_experts: int

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over a token's experts, wherever they are.

        Args:
            hidden_states: `(T, D)`; T may differ between processes, and be zero.
            top_k_index: Experts of each token `(T, K)`, numbered over all processes.
            top_k_weights: `(T, K)`.
        """
        if self.tp_mesh.size() > 1:
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        experts = ExpertGroup(self.ep_mesh.get_group(), self.ep_mesh.size(), self.num_local_experts)
        return run_spread_experts(hidden_states, top_k_index, top_k_weights, experts, self._run_arrived)

    def _run_arrived(self, x_ND: Tensor, arrived_We: Tensor) -> Tensor:
        """Runs the model's own experts module, which takes each row as a token with one expert of weight 1."""
        processes, local_experts = arrived_We.shape
        index_N = torch.arange(local_experts, device=x_ND.device).repeat(processes)
        index_N = index_N.repeat_interleave(arrived_We.flatten(), output_size=len(x_ND))
        if len(x_ND):
            return self.experts_forward(x_ND, index_N[:, None], x_ND.new_ones(len(x_ND), 1))
        # No row came. A row of zeros keeps the backward pass whole, where the exchange and FSDP's reduction still run.
        index_11 = index_N.new_zeros(1, 1)
        return self.experts_forward(x_ND.sum(0, keepdim=True), index_11, x_ND.new_ones(1, 1))[:0]


EPImplementationInterface.register(NAME, MemcpyEP)
