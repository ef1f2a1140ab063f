"""The Compass models with a head: causal language model, classifiers of rows and tokens, question answering.

Read `layers.py`, `pretrained.py` and `decoder.py` first. This module has all models' names, since the `auto_map` of
checkpoints that carry their code looks here. Shapes: B rows, L tokens of a row, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.utils import can_return_tuple

from .configuration_compass import CompassConfig
from .decoder import CompassModel as CompassModel
from .layers import CompassDecoderLayer as CompassDecoderLayer
from .layers import CompassMtpLayer as CompassMtpLayer
from .moe_block import CompassExperts as CompassExperts
from .moe_block import CompassMoeBlock as CompassMoeBlock
from .mtp import IGNORED, LiveMtpCandidateGenerator, mtp_labels, run_shared_head, shift_left
from .outputs import CompassCausalLMOutput
from .pretrained import CompassPreTrainedModel as CompassPreTrainedModel
from .router import expert_load, load_balancing_loss, router_z_loss

# transformers looks here for the code of a model that is saved again, and for all names of its `auto_map`.
CompassModel.__module__ = __name__


class CompassForCausalLM(CompassPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    In training its loss is `L_LM + mtp_loss_coef L_MTP + router_aux_loss_coef L_aux + router_z_loss_coef L_z`. This is
    Compass-v2's loss with MTP added in the form of arXiv 2412.19437, eq. 24 and 25. Reentrant gradient checkpointing,
    which is not the default, gives the router's terms no gradient, as in every MoE model of transformers.

    Attributes:
        token_loss: What sums the cross-entropies of tokens in training where no logits are needed: a function of the
            head, states `[B, L, H]`, the labels that they predict `[B, L]`, and whether the gradient stops before the
            head. The output then has no logits. None, the default, is the loss function of transformers, on logits.
    """

    token_loss: "Callable[[nn.Module, Tensor, Tensor, bool], Tensor] | None" = None

    _trains_mtp_layers = True

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
        """Computes logits, and with `labels` the loss.

        Args:
            input_ids: See [`CompassModel.forward`], also for the arguments up to `inputs_embeds`.
            attention_mask: 0 at padding. Padding counts neither in the router's losses nor in the load. A mask of
                other form, such as `[B, 1, L, past + L]`, says who sees whom and not what is padding.
            position_ids: Positions.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Embeddings in place of `input_ids`.
            labels: Token ids or -100, `[B, L]`, not shifted. In packed rows the first label of each document must be
                -100.
            use_cache: Whether to make a cache. None takes the configuration's choice, or no cache with `labels`.
            output_router_logits: Whether the output carries router logits. None takes the configuration's choice.
            logits_to_keep: As in transformers.
            num_items_in_batch: Number of labels other than -100 in the whole step, over micro-batches and processes.
                The loss and the router's terms are then this micro-batch's share of the step's.
            router_mask: `[B, L]`, 0 at tokens that do not count for the router. Packed rows, which have no
                `attention_mask`, mark their padding by it. None takes `attention_mask`.
            kwargs: See [`CompassModel.forward`].

        Returns:
            Logits `[B, kept, V]` and the losses; see [`CompassCausalLMOutput`]. A loss by `token_loss` has no logits.
        """
        config = self.config
        # What this call computes: the MTP layers and the routers' losses only teach, so training alone needs them.
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        learning = labels is not None and self.training
        with_mtp = learning and bool(config.effective_mtp_loss_coef)
        weighed = bool(config.router_aux_loss_coef or config.router_z_loss_coef)
        record = output_router_logits or (learning and weighed)
        count = output_router_logits or learning  # training logs the load, and the routers' biases are moved by it
        recording = {"output_router_logits": record, "output_expert_indices": count}

        padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None

        # The decoder. A loss needs no cache, and with a cache the documents of a packed row would see each other.
        if labels is not None and use_cache is None:
            use_cache = False
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
        router_logits, experts = outputs.router_logits, outputs.expert_indices

        # The head, only at the places that are asked for, since logits are by far the largest tensor, and not at all
        # where a loss is computed without them.
        logits = lm_loss = None
        if labels is not None and learning and self.token_loss is not None:
            following = kwargs.get("shift_labels")
            following = shift_left(labels, 1, IGNORED) if following is None else following
            items = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            lm_loss = self.token_loss(self.lm_head, hidden_states, following, False) / items
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])

        # The losses of tokens: of the next token, and by the MTP layers of those after it.
        loss = mtp_loss = aux_loss = z_loss = load = None
        if labels is not None:
            if lm_loss is None:
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
                mtp_loss = self._mtp_loss(ahead.states, labels, padding, position_ids, num_items_in_batch)
                loss = loss + config.effective_mtp_loss_coef * mtp_loss
                experts = experts + ahead.expert_indices
                if record:
                    router_logits = router_logits + ahead.router_logits

        # The routers' losses and load, of all layers that ran; padding would pull both towards the experts it takes.
        mask = padding if router_mask is None else router_mask
        mask = None if mask is None else mask[:, -hidden_states.size(1) :]
        if count:
            load = expert_load(experts, config.num_experts, mask)
        if record:
            logits_of_layers = torch.stack(router_logits)
            aux_loss = load_balancing_loss(logits_of_layers, experts, mask, load)
            z_loss = router_z_loss(logits_of_layers, mask)
            if labels is not None and loss is not None:
                loss = loss + self._router_loss(aux_loss, z_loss, labels, num_items_in_batch).to(loss)

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
        """Mean of the MTP layers' losses; a layer without a label counts as 0."""
        if position_ids is None:
            position_ids = torch.arange(labels.size(1), device=labels.device).unsqueeze(0)
        losses = []
        for depth, state in enumerate(states, start=1):
            ahead = mtp_labels(labels, position_ids, depth)
            if attention_mask is not None:
                ahead = ahead.masked_fill(attention_mask == 0, IGNORED)
            items = (ahead != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            detach = self.config.mtp_detach_head
            if self.token_loss is not None:
                losses.append(self.token_loss(self.lm_head, state, ahead, detach) / items)
                continue
            logits = run_shared_head(self.lm_head, state, detach)
            losses.append(
                self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=items, shift_labels=ahead)
            )
        return torch.stack(losses).mean()

    def _router_loss(
        self, aux_loss: Tensor, z_loss: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """The routers' weighed losses, times this micro-batch's share of the step's labels."""
        share = 1.0
        if num_items_in_batch is not None:
            share = (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
        return share * (self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss)

    def _get_candidate_generator(self, generation_config: Any, **kwargs: Any) -> Any:
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(  # pyright: ignore - transformers' own protocol of models
                generation_config=generation_config, **kwargs
            )
        return LiveMtpCandidateGenerator(
            self, generation_config, kwargs["model_kwargs"], logits_processor=kwargs["logits_processor"]
        )


class _WithoutLanguageModel:
    """Base of the models with another head. These never run MTP layers, so it freezes them."""

    def __init__(self, config: CompassConfig):
        # transformers' generic heads make the decoder by `AutoModel`. The configuration's class that travels with a
        # checkpoint is not registered there.
        AutoModel.register(type(config), CompassModel, exist_ok=True)
        super().__init__(config)  # pyright: ignore[reportCallIssue] - the next base class takes it
        self.freeze_idle_layers()  # pyright: ignore[reportAttributeAccessIssue]


class CompassForSequenceClassification(
    _WithoutLanguageModel, GenericForSequenceClassification, CompassPreTrainedModel
):
    """The decoder with a head that scores each row, for reward models."""


class CompassForTokenClassification(_WithoutLanguageModel, GenericForTokenClassification, CompassPreTrainedModel):
    """The decoder with a head that scores each token."""


class CompassForQuestionAnswering(_WithoutLanguageModel, GenericForQuestionAnswering, CompassPreTrainedModel):
    """The decoder with a head that gives each token two scores, for a start and for an end of the answer there."""
