"""Configuration of the Compass models."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3MoeConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class CompassConfig(PreTrainedConfig):
    """A Mixture-of-Experts decoder with few and large experts.

    Of Compass-v3 (arXiv 2509.09121) public are 245B parameters, 71B of them active, 16 experts of which a token takes
    4, and multi-token prediction (MTP) that shares embeddings and head. Of Compass-v2 (arXiv 2504.15527): 2 shared and
    4 routed experts a token, grouped-query attention, rotary positions, a vocabulary of 180k, and the loss
    `L_LM + alpha * L_aux + beta * L_z`. Everything else here (widths, depths, QK-norm, softmax router, coefficients,
    MTP's loss weight) is our choice. [`moe_backbone.preset`] has whole models.

    Args:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Decoder layers, >= 1; each has its experts.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides `num_attention_heads`.
        head_dim: Width of a head, even.
        moe_intermediate_size: Width of an expert.
        num_experts: Routed experts, >= 1.
        num_experts_per_tok: Routed experts that a token takes, 1 to `num_experts`.
        num_shared_experts: Experts that every token takes beside them, of width `moe_intermediate_size` each; they
            are stored as one. Compass-v2 has 2; not known of Compass-v3.
        norm_topk_prob: Whether the probabilities of the chosen experts are scaled to sum to one.
        router_aux_loss_coef: Weight of the load-balancing loss (arXiv 2101.03961), the alpha above.
        router_z_loss_coef: Weight of the router's z-loss (arXiv 2202.08906, eq. 5), the beta above.
        router_bias_update_speed: Step of the biases that balance the load without a loss (arXiv 2408.15664); 0 for
            none. They are added for the choice of experts alone and moved after each step of the optimizer by
            [`moe_backbone.model.router.update_router_biases`], which our pretraining calls.
        output_router_logits: Whether outputs carry the router's logits and the loss its terms in evaluation too.
            In training with `labels` the loss has them either way.
        num_mtp_layers: MTP layers: the first predicts the token after the next, and so on.
        mtp_loss_coef: Weight of the mean of their losses; None for 0.1, or 0 without such layers. At 0 they are
            frozen, and the training of everything else leaves them alone.
        mtp_detach_trunk: Whether MTP's gradient stops before the decoder layers. Compass-v3 "decouples parameter
            updates"; where exactly is not published, hence this and the next option.
        mtp_detach_head: Whether MTP's gradient stops before the shared embeddings and head.
        rope_parameters: As in transformers; YaRN (arXiv 2309.00071) for long contexts is `{"rope_type": "yarn",
            "rope_theta": ..., "factor": ..., "original_max_position_embeddings": ...}`.

    Raises:
        ValueError: The sizes do not fit together; the message names the option and what to set.
    """

    model_type = "compass"
    keys_to_ignore_at_inference = [
        "past_key_values", "router_logits", "aux_loss", "z_loss", "lm_loss", "mtp_loss", "expert_load",
    ]  # fmt: skip
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = Qwen3MoeConfig.base_model_tp_plan
    base_model_ep_plan = Qwen3MoeConfig.base_model_ep_plan
    base_model_pp_plan = Qwen3MoeConfig.base_model_pp_plan

    vocab_size: int = 32_000
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 64
    moe_intermediate_size: int = 1536
    num_experts: int = 16
    num_experts_per_tok: int = 4
    num_shared_experts: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_bias_update_speed: float = 0.0
    output_router_logits: bool = False
    num_mtp_layers: int = 0
    mtp_loss_coef: float | None = None
    mtp_detach_trunk: bool = False
    mtp_detach_head: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, auto_map: dict[str, str] | None = None, **kwargs):
        super().__post_init__(**kwargs)
        # TRL reads it of classes that transformers lacks. To a class that did not come with the checkpoint it is of
        # no use, and would be saved next without the code that it names.
        with_code = type(self)._auto_class is not None
        self.auto_map = {name: of for name, of in (auto_map or {}).items() if with_code or "--" in str(of)}
        self.check()

    @property
    def effective_mtp_loss_coef(self) -> float:
        """`mtp_loss_coef`, or what None stands for."""
        if self.mtp_loss_coef is None:
            return 0.1 if self.num_mtp_layers else 0.0
        return self.mtp_loss_coef

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without an `auto_map` of nothing."""
        options = super().to_dict()
        if not options.get("auto_map"):
            options.pop("auto_map", None)
        return options

    def check(self) -> None:
        """Raises a `ValueError` for sizes that do not fit together."""
        positive = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "moe_intermediate_size",
            "num_experts",
            "num_experts_per_tok",
            "max_position_embeddings",
        )
        not_negative = (
            "num_shared_experts",
            "num_mtp_layers",
            "router_aux_loss_coef",
            "router_z_loss_coef",
            "router_bias_update_speed",
        )
        for least, names in ((1, positive), (0, not_negative)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok={self.num_experts_per_tok}` is above `num_experts={self.num_experts}`: a token "
                f"takes each expert once. Set `num_experts_per_tok` to {self.num_experts} or less."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"`num_attention_heads={self.num_attention_heads}` is not divisible by `num_key_value_heads="
                f"{self.num_key_value_heads}`. Set `num_key_value_heads` to one of {divisors}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"`head_dim={self.head_dim}` must be even and at least 2, since rotary positions turn pairs."
            )
        if self.mtp_loss_coef is not None and self.mtp_loss_coef < 0:
            raise ValueError(f"`mtp_loss_coef` must be at least 0, got {self.mtp_loss_coef}.")
        if self.mtp_loss_coef and not self.num_mtp_layers:
            raise ValueError(
                f"`mtp_loss_coef={self.mtp_loss_coef}` weighs the loss of MTP layers, but `num_mtp_layers` is 0. Set "
                "`num_mtp_layers` to 1 or more, or leave `mtp_loss_coef` out."
            )
