"""The base class of all Compass models: initialisation, loading, and what transformers may do with the models."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils.output_capturing import OutputRecorder

from .configuration_compass import CompassConfig
from .layers import CompassDecoderLayer, CompassMtpLayer, CompassRecord
from .moe_block import CompassExperts
from .router import CompassRouter

# Checkpoint files have a key for each expert. This call stands here, and not in the package's `__init__`, because the
# code that travels with a checkpoint needs it too.
register_checkpoint_conversion_mapping(
    CompassConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe") or [], overwrite=True
)
_MTP_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.eh_proj\.")


class CompassPreTrainedModel(PreTrainedModel):
    """The base class: it initialises weights, and tells transformers what it may record, split and cast."""

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
    _trains_mtp_layers = False
    _can_record_outputs = {
        "router_logits": OutputRecorder(CompassRecord, index=1),
        "expert_indices": OutputRecorder(CompassRecord, index=2),
        "hidden_states": CompassDecoderLayer,
        "attentions": OutputRecorder(CompassRecord, index=0),
    }

    def __init__(self, config: CompassConfig, *args: Any, **kwargs: Any):
        config.check()  # again, since `from_pretrained` sets options on a configuration that was checked before
        super().__init__(config, *args, **kwargs)
        # accelerate and DeepSpeed fail where a listed class or buffer is absent, so only models that have one list it.
        if config.num_mtp_layers:
            self._no_split_modules = ["CompassDecoderLayer", "CompassMtpLayer"]
        if config.router_bias_update_speed:
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, then freezes idle layers again.

        transformers makes every parameter that it loads trainable.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_idle_layers()
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Silences the report on MTP layers of the checkpoint that this configuration leaves out, and on nothing else.

        An MTP layer has the same keys as a decoder layer and `eh_proj` beside them, so the ignored patterns name the
        layers whose `eh_proj` was found. transformers' `MtpModel` finds a checkpoint's MTP layers by these patterns.
        """
        unexpected, missing = (
            sorted({int(match[1]) for key in keys if (match := _MTP_LAYER.search(key))})
            for keys in (loading_info.unexpected_keys, loading_info.missing_keys)
        )
        # Two kinds of unexpected layers stay in the report, since they are mistakes. Where the model misses k MTP
        # layers, it should have loaded the first k unexpected ones. Below `layers`, the model has a layer of its own
        # at the same index, which took an MTP layer's weights for a decoder layer's.
        layers = self.config.num_hidden_layers + self.config.num_mtp_layers
        left_out = [layer for layer in unexpected[len(missing) :] if layer >= layers]
        self._keys_to_ignore_on_load_unexpected = {rf"(^|\.)layers\.{layer}\." for layer in left_out}
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the model's own file for the experts' decorator, which stands in `moe_block.py`. It
        # would find none and run the experts eagerly.
        return True

    def freeze_idle_layers(self) -> None:
        """Freezes MTP layers that no gradient reaches.

        Only the causal language model trains them, and only where `mtp_loss_coef` is above 0. Distributed training
        fails over trainable parameters without a gradient.
        """
        if not (self.config.effective_mtp_loss_coef and self._trains_mtp_layers):
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
