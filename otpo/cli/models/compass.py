"""What training through TRL needs of Compass models. Importing it makes them known to transformers' Auto classes.

TRL's language-model head computes the loss of the next token from the decoder's last state, without the loss of the
MTP layers. They would get no gradient, which stops training on several devices, so their loss is weighed with 0, and
the model freezes them. The checkpoint says so too; a later pretraining sets `mtp_loss_coef` anew.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from moe_backbone import CompassConfig
from moe_backbone.model.modeling_compass import CompassPreTrainedModel
from moe_backbone.packed_attention import NAME as TORCH_VARLEN
from moe_backbone.packed_attention import choose_attention
from otpo_kernels.flash import flash_kernels


def mtp_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What `model_init_kwargs` needs so that MTP layers of such a model stand still; nothing where it has none."""
    idle = isinstance(config, CompassConfig) and config.num_mtp_layers
    return {"mtp_loss_coef": 0.0} if idle else {}


def attention_of_joined_rows(
    config: PreTrainedConfig, args: TrainingArguments, named: str | None, dtype: Any
) -> tuple[str | None, str | None]:
    """The attention implementation of a batch that is one row of documents, where its user names none.

    Without it transformers makes a mask of the row's length squared, and attention computes all of it.

    Args:
        config: Of the model.
        args: Options of the training.
        named: The implementation that the user names; None for none.
        dtype: The option `dtype`, a name or `torch.dtype`; None is what transformers takes for `auto`.

    Returns:
        The implementation, None to leave it to transformers, and what a header says of it, None for nothing.
    """
    told = str(dtype or "auto").removeprefix("torch.")
    unknown = told != "auto" and not isinstance(getattr(torch, told, None), torch.dtype)  # is refused on loading
    if named is not None or unknown or not isinstance(config, CompassConfig):
        return named, None
    resolved: Any = args.accelerator_config
    if resolved.dispatch_batches:
        return None, "sdpa, since one process cuts what it read for all (`dispatch_batches`)"
    attention, why = choose_attention(config, args.device, computing_dtype(args, told, config))
    if attention == TORCH_VARLEN:
        return attention, f"{attention}, {flash_kernels(args.device, config.head_dim)}"
    return None, None if why is None else f"{attention}, since {why}"


def computing_dtype(args: TrainingArguments, named: str, config: CompassConfig) -> torch.dtype:
    """What layers compute in: mixed precision's type where there is one, else that of the weights.

    Args:
        args: Options of the training.
        named: The option `dtype`.
        config: Of the model; its `dtype` is a checkpoint's own.
    """
    if args.mixed_precision in ("bf16", "fp16"):
        return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float16
    return weights_dtype(named, config)


def weights_dtype(named: str, config: CompassConfig) -> torch.dtype:
    """The type of the weights by the option `dtype`; the configuration's own for `auto`."""
    own: Any = config.dtype or torch.float32
    own = getattr(torch, own) if isinstance(own, str) else own
    return own if named == "auto" else getattr(torch, named)


def require_own_code(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` where there is no code to save with a model, since transformers has it."""
    if not isinstance(config, CompassConfig):
        raise ValueError(
            f"`save_code=true` saves the code of Compass models, and transformers has that of '{config.model_type}' "
            "itself. Leave the option out."
        )


def freeze_adapters_of_mtp(model: Any) -> None:
    """Freezes the adapters that PEFT put into idle MTP layers, like the layers."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, CompassPreTrainedModel):
        base.freeze_idle_layers()


def describe_mtp(model: Any) -> dict[str, str]:
    """A line that says so, for a Compass model with idle MTP layers."""
    config = model.config
    if not isinstance(config, CompassConfig) or not config.num_mtp_layers or config.effective_mtp_loss_coef:
        return {}
    return {"mtp": f"{config.num_mtp_layers} layer(s) frozen: their loss is left out, `mtp_loss_coef` is set to 0"}
