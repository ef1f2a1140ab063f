"""Multi-token prediction (MTP): the labels and the head of its layers in training, and drafts by them in `generate`.

MTP layer d counts from 1. At position t it reads the state that predicts token t + d and the embedding of that token,
and it predicts token t + d + 1 with the model's own head. This is DeepSeek-V3's design (arXiv 2412.19437, section
2.2), and transformers' too. Of Compass-v3's MTP only this much is published: its layers share embeddings and head.

Shapes: B rows, L tokens of a row, H hidden size, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.initialization import no_init_weights
from transformers.modeling_layers import MtpModel

# From 5.23 on `output_hidden_states=-1` asks a model for its last state alone, before that a list of layers does. A
# version that gets the other form returns all states or none.
_COUNTS_FROM_THE_END = Version(transformers.__version__) >= Version("5.23")
IGNORED = -100
"""Label of a token that no loss is computed on, as in transformers."""


def shift_left(values: Tensor, steps: int, fill: float) -> Tensor:
    """Values moved to the left: place t gets `values[:, t + steps]`, or `fill` where that is past the end.

    Args:
        values: `[B, L, ...]`.
        steps: >= 0.
        fill: Value of the last `steps` places.
    """
    shifted = torch.full_like(values, fill)
    shifted[:, : max(0, values.size(1) - steps)] = values[:, steps:]
    return shifted


def mtp_labels(labels: Tensor, position_ids: Tensor, depth: int) -> Tensor:
    """Labels of MTP layer `depth`, which never reach into the next document.

    Args:
        labels: Token ids, or -100, `[B, L]`.
        position_ids: Positions, which start at 0 in each document of a row, `[B, L]` or `[1, L]`.
        depth: Number of the MTP layer, >= 1.

    Returns:
        Labels `[B, L]`: the token `depth + 1` places on, -100 where there is none in the same document.
    """
    # The place `depth + 1` before such a token belongs to another document.
    early = position_ids <= depth
    return shift_left(labels.masked_fill(early, IGNORED), depth + 1, IGNORED)


def run_shared_head(head: nn.Module, state: Tensor, detach: bool) -> Tensor:
    """Logits of an MTP layer by the model's own head.

    The head is called as a module, so that hooks on it and modules around it run for MTP layers too.

    Args:
        head: The model's `lm_head`.
        state: State of an MTP layer, `[B, L, H]`.
        detach: Whether the gradient stops before the head's parameters.

    Returns:
        Logits `[B, L, V]`.
    """
    if not detach:
        return head(state)
    weight: Any = head.weight
    if hasattr(weight, "ds_id"):  # ZeRO-3's hooks gather the module's own parameters alone, not detached ones
        return F.linear(state, weight.detach())
    detached = {name: parameter.detach() for name, parameter in head.named_parameters()}
    return functional_call(head, detached, (state,))


class LiveMtpModel(MtpModel):
    """transformers' drafting loop over the MTP layers in memory; the parent class reads them from a checkpoint."""

    def __init__(self, main_model: PreTrainedModel):
        decoder: Any = main_model.get_decoder()
        # The parent makes no layers of its own, and does not initialise embeddings and head, which are the model's.
        with no_init_weights():
            super().__init__(main_model, num_mtp_layers=0)
        self.layers = nn.ModuleList(decoder.mtp_layers)
        self.num_mtp_layers = len(self.layers)


class LiveMtpCandidateGenerator(MTPCandidateGenerator):
    """Drafts tokens with the MTP layers in memory, so that unsaved and adapted models can draft too.

    The parent's `__init__` reads the layers from the checkpoint's files, so it is not called. This `__init__` sets
    every attribute that the parent's sets, as a test proves.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        logits_processor: Any = None,
    ):
        config: Any = main_model.config
        self.num_mtp_layers = config.num_mtp_layers
        if not self.num_mtp_layers:
            raise ValueError("`use_mtp=True`, but the model has no MTP layers (`num_mtp_layers=0`). Leave it out.")
        last = -1 if _COUNTS_FROM_THE_END else [config.num_hidden_layers - 1]
        self.model_kwargs_overrides = {"output_hidden_states": last}
        self.mtp_model = LiveMtpModel(main_model).eval()
        self.device = next(self.mtp_model.layers.parameters()).device
        self.mtp_cache = MtpCache(config=config.get_mtp_config())
        self.mtp_cache.activate_past_recording()
        self.do_sample = generation_config.do_sample
        self.logits_processor = logits_processor
        self.eos_token_id = getattr(generation_config, "_eos_token_tensor", None)
        self.is_main_model_prefill = True
        self._early_states: list[Tensor] = []

    def get_candidates(
        self, input_ids: Any, *, model_outputs: Any = None, is_first_iteration: bool, **kwargs: Any
    ) -> Any:
        """Drafts as the parent does, and nothing until the row has as many tokens as there are MTP layers.

        Where a draft was wrong, the parent runs the layers again over as many places as there are layers, and fails on
        a row that had fewer of them when it began to draft.
        """
        if not is_first_iteration and self.is_main_model_prefill:
            states = torch.cat([*self._early_states, model_outputs.hidden_states[-1]], dim=1)
            self._early_states = [states]
            if states.size(1) < self.num_mtp_layers:
                return input_ids, None
            self._early_states, model_outputs = [], SimpleNamespace(hidden_states=(states,))
        return super().get_candidates(
            input_ids, model_outputs=model_outputs, is_first_iteration=is_first_iteration, **kwargs
        )
