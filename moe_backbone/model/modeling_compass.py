"""The Compass models, in reading order: decoder layer, MTP layer, decoder, causal LM, other heads.

Attention, norms and rotary positions are those of transformers' Qwen3-MoE, masks and caches transformers' own.
Shapes: B rows, L tokens of a row, H hidden size.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .configuration_compass import CompassConfig
from .moe_block import CompassExperts, CompassMoeBlock
from .mtp import IGNORED, LiveMtpCandidateGenerator, mtp_labels, shift_left
from .outputs import CompassCausalLMOutput, CompassModelOutput, CompassMtpOutput
from .router import CompassRouter, expert_load, load_balancing_loss, router_z_loss

# Files have a key for each expert. The code that is saved with a checkpoint needs this too, so it stands here.
register_checkpoint_conversion_mapping(
    CompassConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe") or [], overwrite=True
)
_MTP_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.eh_proj\.")


class CompassDecoderLayer(GradientCheckpointingLayer):
    """Attention and MoE block, each behind a norm and added to the residual stream."""

    def __init__(self, config: CompassConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3MoeAttention(config, layer_idx)  # pyright: ignore - it reads what both configurations have
        self.mlp = CompassMoeBlock(config)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """`[B, L, H]` to `[B, L, H]`; `kwargs` go to the attention."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class CompassMtpLayer(CompassDecoderLayer):
    """A decoder layer whose input is projected from a token's embedding and the state that predicted the token.

    It has a cache of its own, so `layer_idx` counts from 0 again. Names are those of transformers' `MtpLayer`, and so
    are those of its weights on disk: `model.layers.{num_hidden_layers + layer_idx}.*`.
    """

    def __init__(self, config: CompassConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.post_norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, inputs_embeds: Tensor, previous_hidden_state: Tensor, **kwargs: Any) -> Tensor:
        """Both inputs and the result `[B, L, H]`; `kwargs` as in a decoder layer."""
        joined = torch.cat([self.enorm(inputs_embeds), self.hnorm(previous_hidden_state)], dim=-1)
        return self.post_norm(super().forward(self.eh_proj(joined), **kwargs))


class CompassPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, what they can record, and what transformers may do with them."""

    config: CompassConfig
    config_class = CompassConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CompassDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(CompassRouter, index=0),
        "expert_indices": OutputRecorder(CompassRouter, index=2),
        "hidden_states": CompassDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }

    def __init__(self, config: CompassConfig, *args: Any, **kwargs: Any):
        config.check()  # `from_pretrained` sets options on a configuration that is there
        super().__init__(config, *args, **kwargs)
        # Others look for what is listed here and fail where there is none of it.
        if config.num_mtp_layers:
            self._no_split_modules = ["CompassDecoderLayer", "CompassMtpLayer"]
        if config.router_bias_update_speed:
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every parameter that it loads trainable; see `mtp_loss_coef`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_idle_layers()
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Passes over MTP layers of the checkpoint that this configuration leaves out, and over no other layers.

        Only its weights tell an MTP layer from a decoder layer, so the patterns are those of layers that were found.
        transformers' `MtpModel` looks for the MTP layers of a checkpoint by the same patterns.
        """
        unexpected, missing = (
            sorted({int(match[1]) for key in keys if (match := _MTP_LAYER.search(key))})
            for keys in (loading_info.unexpected_keys, loading_info.missing_keys)
        )
        # Those before the missing ones should have been loaded, and one of an index that the model has was taken for a
        # decoder layer: neither is left out.
        layers = self.config.num_hidden_layers + self.config.num_mtp_layers
        left_out = [layer for layer in unexpected[len(missing) :] if layer >= layers]
        self._keys_to_ignore_on_load_unexpected = {rf"(^|\.)layers\.{layer}\." for layer in left_out}
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the experts' decorator in this file alone, and would run them eagerly

    def freeze_idle_layers(self) -> None:
        """Freezes MTP layers that no gradient reaches: of no language model, or with a loss that weighs nothing."""
        if not (self.config.effective_mtp_loss_coef and isinstance(self, CompassForCausalLM)):
            for module in self.modules():
                if isinstance(module, CompassMtpLayer):
                    module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CompassExperts | CompassRouter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        if isinstance(module, CompassRouter) and module.e_score_correction_bias is not None:
            init.zeros_(module.e_score_correction_bias)


class CompassModel(CompassPreTrainedModel):
    """Embeddings, decoder layers and norm; the MTP layers stand after the decoder layers and run when asked for."""

    def __init__(self, config: CompassConfig):
        super().__init__(config)
        # A row at `padding_idx` is not learnt, which a token that pads and also ends or begins a text has to be.
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
        """The MTP layers, the one that predicts the token after the next first."""
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
        """Last hidden states, after the norm.

        Args:
            input_ids: `[B, L]`, or `inputs_embeds` in its place.
            attention_mask: `[B, past + L]`, 0 at padding; None where there is none.
            position_ids: `[B, L]`. Without `attention_mask` and with `use_cache=False`, a row whose positions start
                anew holds several documents, which do not see each other.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: `[B, L, H]`.
            use_cache: Whether to make a cache when there is none.
            kwargs: `output_router_logits`, `output_expert_indices`, `output_hidden_states`, `output_attentions`, and
                what an attention implementation takes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs_embeds = inputs_embeds if input_ids is None else self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_ids, causal_mask = self._positions(inputs_embeds, attention_mask, position_ids, past_key_values)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
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
        """States of the MTP layers over a whole row, as training needs them.

        Depth d pairs the state at t with the embedding of token t + d. What stands at a document's last d places
        pairs with the next document; nothing of the document attends to it, and [`mtp_labels`] leaves it out.
        """
        position_ids, causal_mask = self._positions(inputs_embeds, attention_mask, position_ids, None)
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
    ) -> tuple[Tensor, Any]:
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.size(1), device=inputs_embeds.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return position_ids, mask


class CompassForCausalLM(CompassPreTrainedModel, GenerationMixin):
    """The decoder with a head.

    In training its loss is `L_LM + mtp_loss_coef L_MTP + router_aux_loss_coef L_aux + router_z_loss_coef L_z`:
    Compass-v2's with MTP added in the form of arXiv 2412.19437, eq. 24 and 25. Reentrant gradient checkpointing, which
    is not the default, leaves the router's terms without a gradient, as in all of transformers' models.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore - as in transformers' own models

    def __init__(self, config: CompassConfig):
        super().__init__(config)
        self.model = CompassModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze_idle_layers()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        router_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CompassCausalLMOutput:
        """Logits, and with `labels` the loss.

        Args:
            input_ids: See [`CompassModel.forward`], also for the arguments up to `inputs_embeds`.
            attention_mask: 0 at padding, which counts neither in the router's losses nor in the load.
            position_ids: Positions.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Embeddings in place of `input_ids`.
            labels: Token ids or -100, `[B, L]`, not shifted. The first token of each document of a packed row is to
                be -100.
            use_cache: Whether to make a cache; None for the configuration's, and for no with `labels`.
            output_router_logits: Whether the output carries router logits; None for the configuration's.
            logits_to_keep: As in transformers.
            num_items_in_batch: Labels of the whole step that are not -100, over micro-batches and processes. The loss
                is then this batch's share of the step's, and so are the router's terms.
            router_mask: `[B, L]`, 0 for tokens that do not count for the router, such as the padding of packed rows,
                which have no `attention_mask`; None for `attention_mask`.
            kwargs: See [`CompassModel.forward`].
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        learning = labels is not None and self.training
        with_mtp = learning and bool(config.effective_mtp_loss_coef)
        weighed = bool(config.router_aux_loss_coef or config.router_z_loss_coef)
        record = output_router_logits or (learning and weighed)
        count = output_router_logits or learning  # whoever trains wants to see the load, and the biases live by it
        recording = {"output_router_logits": record, "output_expert_indices": count}
        if labels is not None and use_cache is None:
            use_cache = False  # a loss needs none, and with one the documents of a packed row would see each other
        if with_mtp and input_ids is not None:
            input_ids, inputs_embeds = None, self.model.embed_tokens(input_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **recording,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        router_logits, experts = outputs.router_logits, outputs.expert_indices

        loss = lm_loss = mtp_loss = aux_loss = z_loss = load = None
        if labels is not None:
            lm_loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
            loss = lm_loss
            if with_mtp and inputs_embeds is not None:
                ahead = self.model.predict_ahead(
                    hidden_states.detach() if config.mtp_detach_trunk else hidden_states,
                    inputs_embeds.detach() if config.mtp_detach_head else inputs_embeds,
                    attention_mask,
                    position_ids,
                    **recording,
                    **kwargs,
                )
                mtp_loss = self._mtp_loss(ahead.states, labels, attention_mask, position_ids, num_items_in_batch)
                loss = loss + config.effective_mtp_loss_coef * mtp_loss
                experts = experts + ahead.expert_indices
                if record:
                    router_logits = router_logits + ahead.router_logits
        mask = attention_mask if router_mask is None else router_mask
        mask = None if mask is None else mask[:, -hidden_states.size(1) :]
        if count:
            load = expert_load(experts, config.num_experts, mask)
        if record:
            aux_loss = load_balancing_loss(router_logits, experts, mask)
            z_loss = router_z_loss(router_logits, mask)
            if labels is not None and loss is not None:
                share = 1.0
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
                regulariser = config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
                loss = loss + (share * regulariser).to(loss)

        return CompassCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits if output_router_logits else None,
            aux_loss=aux_loss,
            z_loss=z_loss,
            lm_loss=lm_loss,
            mtp_loss=mtp_loss,
            expert_load=load,
        )

    def _mtp_loss(
        self,
        states: tuple[Tensor, ...],
        labels: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Mean of the MTP layers' losses, by the shared head; 0 for a layer that has nothing to predict."""
        if position_ids is None:
            position_ids = torch.arange(labels.size(1), device=labels.device).unsqueeze(0)
        losses = []
        for depth, state in enumerate(states, start=1):
            ahead = mtp_labels(labels, position_ids, depth)
            if attention_mask is not None:
                ahead = ahead.masked_fill(attention_mask == 0, IGNORED)
            items = (ahead != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            logits = self._shared_head(state)
            losses.append(
                self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=items, shift_labels=ahead)
            )
        return torch.stack(losses).mean()

    def _shared_head(self, state: Tensor) -> Tensor:
        """The head called as a module, so that what is hooked onto it or wraps it runs for MTP layers too."""
        if not self.config.mtp_detach_head:
            return self.lm_head(state)
        if hasattr(self.lm_head.weight, "ds_id"):  # ZeRO-3, whose hooks take the module's own parameters alone
            return F.linear(state, self.lm_head.weight.detach())
        detached = {name: parameter.detach() for name, parameter in self.lm_head.named_parameters()}
        return functional_call(self.lm_head, detached, (state,))

    def _get_candidate_generator(self, generation_config: Any, **kwargs: Any) -> Any:
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(  # pyright: ignore - transformers' own protocol of models
                generation_config=generation_config, **kwargs
            )
        return LiveMtpCandidateGenerator(
            self, generation_config, kwargs["model_kwargs"], logits_processor=kwargs["logits_processor"]
        )


class _WithoutLanguageModel:
    """What the models with another head share: MTP layers, which only a language model runs, stand still in them."""

    def __init__(self, config: CompassConfig):
        # The decoder is made by `AutoModel`. Saved code has a class of configurations that nobody has registered.
        AutoModel.register(type(config), CompassModel, exist_ok=True)
        super().__init__(config)  # pyright: ignore[reportCallIssue] - of the class that stands behind it
        self.freeze_idle_layers()  # pyright: ignore[reportAttributeAccessIssue]


class CompassForSequenceClassification(
    _WithoutLanguageModel, GenericForSequenceClassification, CompassPreTrainedModel
):
    """The decoder with a score for each row, for reward models."""


class CompassForTokenClassification(_WithoutLanguageModel, GenericForTokenClassification, CompassPreTrainedModel):
    """The decoder with scores for each token."""


class CompassForQuestionAnswering(_WithoutLanguageModel, GenericForQuestionAnswering, CompassPreTrainedModel):
    """The decoder with two scores for each token: that the answer starts there, and that it ends there."""
