"""The MoE block: a router, routed experts that any of transformers' implementations runs, and a shared expert.

Shapes: B rows, L tokens of a row, T = B * L tokens, E experts, K experts that a token takes, H hidden size, I width of
an expert. A suffix such as `tokens_TH` names a tensor's dimensions.
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
    """SwiGLU experts in two tensors.

    The model's `experts_implementation` says which of transformers' functions runs them; "eager" is `forward`.

    Args:
        config: Of the model.
        gate_up_proj: `[E, 2 I, H]`, gate and up projection of each expert.
        down_proj: `[E, H, I]`.
        act_fn: The activation of the gate.
    """

    def __init__(self, config: CompassConfig, gate_up_proj: Tensor, down_proj: Tensor, act_fn: nn.Module):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sums each token's experts by their weights.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: Experts `[T, K]`; `num_experts` stands for an expert that another process holds.
            top_k_weights: `[T, K]`.

        Returns:
            `[T, H]`.
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
    """The experts that a Compass model learns."""

    def __init__(self, config: CompassConfig):
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        super().__init__(
            config, gate_up_proj, nn.Parameter(torch.empty(experts, hidden, width)), ACT2FN[config.hidden_act]
        )
        self.register_load_state_dict_pre_hook(_join_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sums each token's experts as [`GatedExperts.forward`] does, in autocast's dtype where autocast is on.

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
    """Joins a checkpoint file's matrices, which have a key for each expert, to the two tensors of [`CompassExperts`].

    transformers' Trainer passes files to `load_state_dict` one by one when it resumes. Without this hook the keys
    would match nothing, and training would go on with the experts in memory. A file may hold any part of the matrices;
    the others stay as they are and count as missing.
    """
    for name, matrices in _MATRICES.items():
        keys = [[f"{prefix}{expert}.{matrix}.weight" for matrix in matrices] for expert in range(module.num_experts)]
        given = {key: state_dict.pop(key) for expert in keys for key in expert if key in state_dict}
        if not given:
            continue
        own = getattr(module, name)
        own = torch.zeros(own.shape, dtype=own.dtype) if own.is_meta else own.detach()
        # With `assign=True` torch puts the loaded tensor in the parameter's place, which gets its dtype and device.
        assigned = local_metadata.get("assign_to_params_buffers")
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
    """Router, routed experts, and a shared expert where the configuration has one."""

    def __init__(self, config: CompassConfig):
        super().__init__()
        self.gate = CompassRouter(config)
        self.experts = CompassExperts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=shared) if shared else None

    def forward(self, hidden_states: Tensor, with_routing: bool = False) -> Any:
        """Adds up each token's routed experts and the shared expert.

        Args:
            hidden_states: `[B, L, H]`.
            with_routing: Whether to return the router's logits `[T, E]` and choices `[T, K]` beside the sum.

        Returns:
            `[B, L, H]`, or a tuple of it, logits and choices.
        """
        tokens_TH = hidden_states.reshape(-1, hidden_states.size(-1))
        logits_TE, weights_TK, experts_TK = self.gate(tokens_TH)
        output_TH = self.experts(tokens_TH, experts_TK, weights_TK)
        if self.shared_expert is not None:
            output_TH = output_TH + self.shared_expert(tokens_TH)
        output = output_TH.view_as(hidden_states)
        return (output, logits_TE, experts_TK) if with_routing else output
