"""Expert parallelism of transformers itself (from 5.21 on), over FSDP2, with our row moves.

Here the model spreads its experts as it is loaded, `from_pretrained(..., distributed_config=...)`, and DeepSpeed has
no part in it. `deepspeed_config` is the other way; see there for what is shared inside a machine.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.distributed_c10d import all_to_all_single
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface

from moe_backbone.memcpy_experts import NAME
from otpo_kernels.memcpy import permute, route, unpermute


def native_expert_parallel_options(ep_size: int, world_size: int) -> dict[str, Any]:
    """Options of `from_pretrained` that spread the experts over `ep_size` processes, and all else over all of them."""
    distributed = DistributedConfig(fsdp_size=world_size, ep_size=ep_size, ep_implementation=NAME)
    return {"distributed_config": distributed, "experts_implementation": NAME}


def require_native_expert_parallelism(model: nn.Module, ep_size: int) -> str:
    """Describes what really runs, after making sure that the experts of a model were spread as asked.

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
    local = experts[0].num_experts
    return (
        f"{local} of {local * ep_size} in each process, over {ep_size} process(es), in {len(experts)} layers; "
        "transformers' own, with FSDP2"
    )


class MemcpyEP(AllToAllEP):
    """transformers' all-to-all, its sort, gather and scatter replaced by ours.

    A tensor-parallel group splits its batch in the parent's way, so with one the parent runs.
    """

    num_local_experts: int

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum `[T, H]` over a token's experts `[T, K]`, numbered over all processes."""
        if self.tp_mesh.size() > 1:
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        group, ep_size = self.ep_mesh.get_group(), self.ep_mesh.size()
        routing = route(top_k_index, ep_size * self.num_local_experts)
        sent = routing.counts.view(ep_size, self.num_local_experts)
        received = torch.empty_like(sent)
        all_to_all_single(received, sent, group=group)
        sizes = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        rows = self._exchange(permute(hidden_states, routing), *sizes)
        experts = torch.arange(self.num_local_experts, device=rows.device).repeat(ep_size)
        experts = experts.repeat_interleave(received.flatten(), output_size=len(rows))[:, None]
        if len(rows):
            rows = self.experts_forward(rows, experts, rows.new_ones(len(rows), 1))
        else:  # stays connected to the backward pass, where the exchange and FSDP's reduction still run
            one = experts.new_zeros(1, 1)
            rows = self.experts_forward(rows.sum(0, keepdim=True), one, rows.new_ones(1, 1))[:0]
        return unpermute(self._exchange(rows, *reversed(sizes)), routing, top_k_weights)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        exchanged: Any = all_to_all_single_autograd(rows.contiguous(), received, sent, self.ep_mesh.get_group())
        return exchanged.wait() if hasattr(exchanged, "wait") else exchanged


EPImplementationInterface.register(NAME, MemcpyEP)
