"""The decoder: embeddings, decoder layers and norm, and the MTP layers behind them.

transformers provides masks, caches and rotary positions. Shapes: B rows, L tokens of a row, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeRotaryEmbedding
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .configuration_compass import CompassConfig
from .layers import CompassDecoderLayer, CompassMtpLayer
from .mtp import shift_left
from .outputs import CompassModelOutput, CompassMtpOutput
from .pretrained import CompassPreTrainedModel
from .router import CompassRouter


class CompassModel(CompassPreTrainedModel):
    """Embeddings, decoder layers and norm. Its `layers` end with the MTP layers, which `predict_ahead` alone runs."""

    def __init__(self, config: CompassConfig):
        super().__init__(config)
        # torch trains no embedding at `padding_idx`. A padding token that also begins or ends texts has to be trained.
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        padding = None if config.pad_token_id in (config.bos_token_id, *ends) else config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        decoder = [CompassDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        mtp = [CompassMtpLayer(config, index) for index in range(config.num_mtp_layers)]
        self.layers = nn.ModuleList(decoder + mtp)
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)  # pyright: ignore
        self.gradient_checkpointing = False
        self.post_init()
        maybe_install_capturing_hooks(self)  # they can't be installed while `torch.compile` traces

    @property
    def mtp_layers(self) -> list[CompassMtpLayer]:
        """The MTP layers; the first predicts the token after the next."""
        return [layer for layer in self.layers if isinstance(layer, CompassMtpLayer)]

    @property
    def routers(self) -> list[CompassRouter]:
        """The routers of all layers, MTP layers last."""
        return [module for module in self.modules() if isinstance(module, CompassRouter)]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CompassModelOutput:
        """Computes the last hidden states, after the norm.

        Args:
            input_ids: `[B, L]`, or `inputs_embeds` in its place.
            attention_mask: `[B, past + L]`, 0 at padding; None where no token is padding.
            position_ids: `[B, L]`. Without `attention_mask` and with `use_cache=False`, each position 0 in a row
                begins another document, and documents do not see each other.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: `[B, L, H]`.
            use_cache: Whether to make a cache where none is given.
            kwargs: `output_router_logits`, `output_expert_indices`, `output_hidden_states`, `output_attentions`, and
                options of the attention implementation, such as `cu_seq_lens_q` and `max_length_q` of packed rows.

        Raises:
            ValueError: The call gives both or none of `input_ids` and `inputs_embeds`.
        """
        # The inputs in one form, and one mask and one set of rotary angles that all layers share.
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs_embeds = inputs_embeds if input_ids is None else self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_ids, causal_mask = self._positions(
            inputs_embeds, attention_mask, position_ids, past_key_values, told=_tells_ends(kwargs)
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        # The decoder layers alone: MTP layers stand behind them in the list and read other inputs.
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return CompassModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    @capture_outputs
    def predict_ahead(
        self,
        last_hidden_state: Tensor,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CompassMtpOutput:
        """Runs the MTP layers over whole rows, as training needs them.

        Layer d pairs the state at t with the embedding of token t + d. At a document's last d places this token is of
        the next document. No other place of the document attends to them, and [`mtp_labels`] gives them no label.

        Args:
            last_hidden_state: The decoder's states, `[B, L, H]`.
            inputs_embeds: Embeddings of the same tokens, `[B, L, H]`.
            attention_mask: As in [`CompassModel.forward`], and so are `position_ids` and `kwargs`.
            position_ids: Positions.
            kwargs: Options.
        """
        position_ids, causal_mask = self._positions(
            inputs_embeds, attention_mask, position_ids, None, told=_tells_ends(kwargs)
        )
        states, state = [], last_hidden_state
        for depth, layer in enumerate(self.mtp_layers, start=1):
            state = layer(
                shift_left(inputs_embeds, depth, 0.0),
                state,
                position_embeddings=self.rotary_emb(state, position_ids=position_ids + depth),
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=None,
                **kwargs,
            )
            states.append(state)
        return CompassMtpOutput(states=tuple(states))

    def _positions(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        *,
        told: bool,
    ) -> tuple[Tensor, Any]:
        """Position ids `[B, L]` or `[1, L]`, and the causal mask in the form of the attention implementation.

        Attention that is told where documents end needs no mask. transformers would look for the documents by their
        positions, for which it waits for the device.
        """
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.size(1), device=inputs_embeds.device) + past).unsqueeze(0)
        by_lengths = any(word in str(self.config._attn_implementation) for word in ("flash", "varlen"))
        if told and by_lengths and attention_mask is None and past_key_values is None:
            return position_ids, None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return position_ids, mask


def _tells_ends(options: dict[str, Any]) -> bool:
    """Whether a call's options say where the documents of its row end."""
    return options.get("cu_seq_lens_q") is not None and options.get("max_length_q") is not None
