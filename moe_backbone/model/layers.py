"""The layers: a decoder layer, and the MTP layer that wraps one.

transformers' Qwen3-MoE provides attention, norms and rotary positions. transformers records what layers compute by
hooks, and a graph of `torch.compile` breaks at each of them. So a layer computes in `run`, where nothing is hooked,
and shows what it computed to a module that does nothing but carry the hooks.
Shapes: B rows, L tokens of a row, T = B * L tokens, E experts, K experts that a token takes, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRMSNorm

from .configuration_compass import CompassConfig
from .moe_block import CompassMoeBlock

LayerResults = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""Residual stream `[B, L, H]`, the attention's weights where its implementation has them, the router's logits `[T, E]`
in float32, and the experts that each token took `[T, K]`."""


class CompassRecord(nn.Module):
    """Where transformers' recorders hook a layer: it gets what a layer has computed and returns it."""

    def forward(
        self, attention_weights: Tensor | None, router_logits: Tensor, experts: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns its arguments, which [`LayerResults`] describes."""
        return attention_weights, router_logits, experts


class CompassAttention(Qwen3MoeAttention):
    """Qwen3-MoE's attention, or Mixtral's, which norms neither queries nor keys, where `use_qk_norm` is off."""

    def __init__(self, config: CompassConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # pyright: ignore - it reads options that ours has too
        if not config.use_qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()  # pyright: ignore - called like the norms


class CompassDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the MoE block; each reads the normed residual stream and adds its result to the stream."""

    _compiled_run: Any = None

    def __init__(self, config: CompassConfig, layer_idx: int):
        super().__init__()
        self.self_attn = CompassAttention(config, layer_idx)
        self.mlp = CompassMoeBlock(config)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.record = CompassRecord()

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Residual stream after the layer, `[B, L, H]`.

        Args:
            hidden_states: The residual stream, `[B, L, H]`.
            position_embeddings: Cosines and sines of the rotary positions.
            attention_mask: transformers' causal mask in the form of the attention implementation; None for none.
            kwargs: Go to the attention: `position_ids`, `past_key_values`, and an implementation's own.
        """
        return self._run_and_record(
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )

    def run(self, hidden_states: Tensor, **kwargs: Any) -> LayerResults:
        """Computes the layer, without the recording: what [`CompassDecoderLayer.compile`] compiles."""
        attended, attention_weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        output, router_logits, experts = self.mlp(self.post_attention_layernorm(hidden_states), with_routing=True)
        return hidden_states + output, attention_weights, router_logits, experts

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles [`CompassDecoderLayer.run`] at its next call, in place of all that `nn.Module.compile` takes.

        Hooks on the layer, recording and gradient checkpointing stay around the graph, so that neither of them breaks
        it, and one graph serves forward passes and those that are run again for their gradients.

        Args:
            args: Of `torch.compile`, and so are `kwargs`.
            kwargs: Options.
        """
        self._compiled_run = torch.compile(self.run, *args, **kwargs)

    def _run_and_record(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states, *recorded = (self._compiled_run or self.run)(*args, **kwargs)
        self.record(*recorded)
        return hidden_states

    def __getstate__(self) -> dict[str, Any]:
        # As torch does for a compiled module: copies and pickled layers are not compiled.
        return {name: value for name, value in super().__getstate__().items() if name != "_compiled_run"}


class CompassMtpLayer(CompassDecoderLayer):
    """A decoder layer that reads a projection of a token's embedding and of the state that predicted this token.

    MTP layers have a cache of their own, so `layer_idx` counts from 0 again. The attributes have the names of
    transformers' `MtpLayer`, so that weights on disk do too: `model.layers.{num_hidden_layers + layer_idx}.*`.
    """

    def __init__(self, config: CompassConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.post_norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, inputs_embeds: Tensor, previous_hidden_state: Tensor, **kwargs: Any) -> Tensor:
        """State that predicts one token further.

        Args:
            inputs_embeds: Embeddings of the tokens that `previous_hidden_state` predicted, `[B, L, H]`.
            previous_hidden_state: States of the decoder or of the MTP layer before, `[B, L, H]`.
            kwargs: See [`CompassDecoderLayer.forward`].

        Returns:
            States `[B, L, H]`, normed for the head.
        """
        return self._run_and_record(inputs_embeds, previous_hidden_state, **kwargs)

    def run(self, inputs_embeds: Tensor, previous_hidden_state: Tensor, **kwargs: Any) -> LayerResults:  # pyright: ignore
        """Computes the layer, without the recording; see [`CompassDecoderLayer.run`]."""
        joined = torch.cat([self.enorm(inputs_embeds), self.hnorm(previous_hidden_state)], dim=-1)
        hidden_states, attention_weights, router_logits, experts = super().run(self.eh_proj(joined), **kwargs)
        return self.post_norm(hidden_states), attention_weights, router_logits, experts
