"""The layers: a decoder layer, and the MTP layer that wraps one.

transformers' Qwen3-MoE provides attention, norms and rotary positions.
Shapes: B rows, L tokens of a row, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRMSNorm

from .configuration_compass import CompassConfig
from .moe_block import CompassMoeBlock


class CompassDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the MoE block; each reads the normed residual stream and adds its result to the stream."""

    def __init__(self, config: CompassConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3MoeAttention(config, layer_idx)  # pyright: ignore - it reads options that ours has too
        self.mlp = CompassMoeBlock(config)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

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
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


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
        joined = torch.cat([self.enorm(inputs_embeds), self.hnorm(previous_hidden_state)], dim=-1)
        return self.post_norm(super().forward(self.eh_proj(joined), **kwargs))
