"""What training through TRL needs of Compass models. Importing it makes them known to transformers' Auto classes.

TRL's language-model head computes the loss of the next token from the decoder's last state, without the loss of the
MTP layers. They would get no gradient, which stops training on several devices, so their loss is weighed with 0, and
the model freezes them. The checkpoint says so too; a later pretraining sets `mtp_loss_coef` anew.
"""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from moe_backbone import CompassConfig
from moe_backbone.model.modeling_compass import CompassPreTrainedModel


def mtp_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What `model_init_kwargs` needs so that MTP layers of such a model stand still; nothing where it has none."""
    idle = isinstance(config, CompassConfig) and config.num_mtp_layers
    return {"mtp_loss_coef": 0.0} if idle else {}


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
