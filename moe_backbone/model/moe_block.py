"""The MoE block: routed experts, run by any of transformers' implementations, and shared ones.

Shapes: B rows, L tokens of a row, T = B * L, E experts, K experts that a token takes, H hidden size, F experts' width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from .configuration_compass import CompassConfig
from .router import CompassRouter


@use_experts_implementation
class GatedExperts(nn.Module):
    """Experts with a gate, run by the implementation of transformers that `config` names; "eager" is `forward`.

    Args:
        config: Of the model.
        gate_up_proj: `[E, 2F, H]`, gate and up projection of each expert.
        down_proj: `[E, H, F]`.
        act_fn: What the gate goes through.
    """

    def __init__(self, config: CompassConfig, gate_up_proj: Tensor, down_proj: Tensor, act_fn: nn.Module):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over a token's experts.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: Experts `[T, K]`; `num_experts` stands for one that another process holds.
            top_k_weights: `[T, K]`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            row = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (row * top_k_weights[token, slot, None]).to(output.dtype))
        return output


class CompassExperts(GatedExperts):
    """The experts that Compass learns, in two tensors."""

    def __init__(self, config: CompassConfig):
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        super().__init__(
            config, gate_up_proj, nn.Parameter(torch.empty(experts, hidden, width)), ACT2FN[config.hidden_act]
        )
        self.register_load_state_dict_pre_hook(_join_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As [`GatedExperts.forward`], in autocast's dtype where it is on.

        Grouped products know no autocast and would run in float32. So experts made of the cast weights run in place of
        these. The weights are read here, behind the hooks that fetch offloaded and sharded ones, and with the adapters
        that PEFT adds to them.
        """
        device = hidden_states.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        dtype = torch.get_autocast_dtype(device)
        cast = GatedExperts(self.config, self.gate_up_proj.to(dtype), self.down_proj.to(dtype), self.act_fn)
        # transformers' own expert parallelism leaves these two marks on the experts that it spreads.
        cast.num_experts, cast._is_expert_parallel = self.num_experts, self._is_expert_parallel
        # By the class, since `torch.compile` does not follow the dispatch of an object that was made while it traces.
        return GatedExperts.forward(cast, hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))


_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@torch.no_grad()
def _join_experts(
    module: Any,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Takes the layout of files, a key for each expert's matrices, where a file goes straight to `load_state_dict`.

    transformers' Trainer does that when it resumes, file by file, and otherwise goes on with the experts that it finds
    in memory. A file may hold any part of the matrices; those that it lacks stay as they are and count as missing.
    """
    for name, matrices in _MATRICES.items():
        keys = [[f"{prefix}{expert}.{matrix}.weight" for matrix in matrices] for expert in range(module.num_experts)]
        given = {key: state_dict.pop(key) for expert in keys for key in expert if key in state_dict}
        if not given:
            continue
        own = getattr(module, name)
        own = torch.zeros(own.shape, dtype=own.dtype) if own.is_meta else own.detach()
        assigned = local_metadata.get("assign_to_params_buffers")  # what is loaded takes the place of what is there
        whole = own.to(next(iter(given.values())) if assigned else own, copy=True)
        for expert, rows in zip(keys, whole, strict=True):
            for key, place in zip(expert, rows.chunk(len(matrices)), strict=True):
                if key not in given:
                    missing_keys.append(key)
                elif given[key].shape != place.shape:
                    error_msgs.append(
                        f"size mismatch for {key}: copying a param with shape {given[key].shape} from checkpoint, the "
                        f"shape in current model is {place.shape}."
                    )
                else:
                    place.copy_(given[key])
        state_dict[f"{prefix}{name}"] = whole


class CompassMoeBlock(nn.Module):
    """Router, routed experts, and the shared expert where there is one."""

    def __init__(self, config: CompassConfig):
        super().__init__()
        self.gate = CompassRouter(config)
        self.experts = CompassExperts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, L, H]` to `[B, L, H]`."""
        tokens = hidden_states.reshape(-1, hidden_states.size(-1))
        _, weights, experts = self.gate(tokens)
        output = self.experts(tokens, experts, weights)
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        return output.view_as(hidden_states)
