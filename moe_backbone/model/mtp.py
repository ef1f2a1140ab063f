"""Multi-token prediction (MTP): what its layers are trained on, and drafting with them in `generate`.

MTP layer d, from 1 on, reads at position t the state that predicts token t + d and the embedding of that token, and
predicts token t + d + 1 with the model's own head. The layout is that of DeepSeek-V3 (arXiv 2412.19437, section 2.2),
which transformers follows; Compass-v3 publishes that its layers share embeddings and head, not more.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.initialization import no_init_weights
from transformers.modeling_layers import MtpModel

# How a model is asked for its last state alone; asked the other way, it returns all or none.
_COUNTS_FROM_THE_END = Version(transformers.__version__) >= Version("5.23")
IGNORED = -100
"""Label of a token that no loss is computed on, as in transformers."""


def shift_left(values: Tensor, steps: int, fill: float) -> Tensor:
    """`values[:, t + steps]` at place t, and `fill` where that is past the end.

    Args:
        values: `[B, L, ...]`.
        steps: >= 0.
        fill: What stands at the last `steps` places.
    """
    shifted = torch.full_like(values, fill)
    shifted[:, : max(0, values.size(1) - steps)] = values[:, steps:]
    return shifted


def mtp_labels(labels: Tensor, position_ids: Tensor, depth: int) -> Tensor:
    """What MTP layer `depth` is to predict at each position, without reaching into the next document.

    Args:
        labels: Token ids, or -100, `[B, L]`.
        position_ids: Positions, from 0 on in each document of a row, `[B, L]` or `[1, L]`.
        depth: From 1 on.

    Returns:
        Labels `[B, L]`: the token `depth + 1` places on, -100 where there is none in the same document.
    """
    other_document = position_ids <= depth  # of a token: its document began after the place that would predict it
    return shift_left(labels.masked_fill(other_document, IGNORED), depth + 1, IGNORED)


class LiveMtpModel(MtpModel):
    """transformers' drafting loop over the MTP layers that the model holds, in place of layers read from its files."""

    def __init__(self, main_model: PreTrainedModel):
        decoder: Any = main_model.get_decoder()
        with no_init_weights():  # of the embeddings and the head, which are the model's
            super().__init__(main_model, num_mtp_layers=0)  # makes no layers of its own
        self.layers = nn.ModuleList(decoder.mtp_layers)
        self.num_mtp_layers = len(self.layers)


class LiveMtpCandidateGenerator(MTPCandidateGenerator):
    """Drafts tokens with the model's own MTP layers, so that unsaved and adapted models can draft too.

    The parent's `__init__` reads layers from the checkpoint's files; what else it sets is set here, as a test proves.
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
