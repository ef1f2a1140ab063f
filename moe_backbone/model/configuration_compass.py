"""Configuration of the Compass models: every option, its range, and which values are published."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3MoeConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class CompassConfig(PreTrainedConfig):
    """A Mixture-of-Experts decoder with few and large experts.

    The Compass-v3 paper (arXiv 2509.09121) publishes 245B parameters, 71B of them active, 16 experts of which a token
    takes 4, and multi-token prediction (MTP) that shares embeddings and head. The Compass-v2 paper (arXiv 2504.15527)
    publishes 2 shared and 4 routed experts a token, grouped-query attention, rotary positions, a vocabulary of 180k,
    and the loss `L_LM + alpha * L_aux + beta * L_z`. We chose everything else: widths, depths, QK-norm, the softmax
    router, coefficients, and the weight of MTP's loss. [`moe_backbone.preset`] makes whole configurations.

    Args:
        vocab_size: Number of tokens in the vocabulary, >= 1.
        hidden_size: Width of the residual stream, >= 1.
        num_hidden_layers: Number of decoder layers, >= 1. Each has experts of its own.
        num_attention_heads: Number of query heads, >= 1.
        num_key_value_heads: Number of key and value heads; it divides `num_attention_heads`.
        head_dim: Width of a head, even.
        use_qk_norm: Whether attention norms queries and keys, as Qwen3-MoE does. Mixtral does not.
        moe_intermediate_size: Width of an expert, >= 1.
        num_experts: Number of routed experts in a layer, >= 1.
        num_experts_per_tok: Number of routed experts that a token takes, 1 to `num_experts`.
        num_shared_experts: Number of experts that every token takes beside the routed ones, >= 0. Each has width
            `moe_intermediate_size`, and the model stores them as one expert of their whole width. Compass-v2 has 2;
            Compass-v3's number is not published.
        norm_topk_prob: Whether the router scales the probabilities of a token's experts to sum to one.
        router_aux_loss_coef: Weight of the load-balancing loss (arXiv 2101.03961), the alpha above.
        router_z_loss_coef: Weight of the router's z-loss (arXiv 2202.08906, eq. 5), the beta above.
        router_bias_update_speed: Step of the biases that balance the load without a loss (arXiv 2408.15664); at 0
            routers have no biases. The router adds the biases to probabilities to choose experts, not to weigh them.
            [`moe_backbone.model.router.update_router_biases`] moves them; our pretraining calls it after each step of
            the optimizer.
        output_router_logits: Whether outputs carry the router's logits, and whether the loss has the router's terms in
            evaluation. In training with `labels` the loss always has them.
        num_mtp_layers: Number of MTP layers, >= 0. The first predicts the token after the next, the second the token
            after that, and so on.
        mtp_loss_coef: Weight of the mean of the MTP layers' losses, >= 0. None stands for 0.1, or for 0 in a model
            without MTP layers. At 0 the MTP layers are frozen, and training never runs them.
        mtp_detach_trunk: Whether MTP's gradient stops before the decoder layers. The Compass-v3 paper says that it
            "decouples parameter updates" but not where; this option and the next offer both places.
        mtp_detach_head: Whether MTP's gradient stops before the shared embeddings and head.
        rope_parameters: Rotary positions as in transformers. `{"rope_type": "yarn", "rope_theta": ..., "factor": ...,
            "original_max_position_embeddings": ...}` is YaRN (arXiv 2309.00071), which serves long contexts.

    Raises:
        ValueError: An option is out of its range, or sizes do not fit together. The message names the option and what
            to set.
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
    use_qk_norm: bool = True
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
        # TRL reads `auto_map` from configurations of models that transformers lacks, so there always is one. It keeps
        # a checkpoint's entries only if this class came with the checkpoint's code, or if they name code on the Hub:
        # the next `save_pretrained` would write the others without the code that they name.
        with_code = type(self)._auto_class is not None
        self.auto_map = {name: of for name, of in (auto_map or {}).items() if with_code or "--" in str(of)}
        self.check()

    @property
    def effective_mtp_loss_coef(self) -> float:
        """Weight of the MTP loss: `mtp_loss_coef`, or the value that None stands for."""
        if self.mtp_loss_coef is None:
            return 0.1 if self.num_mtp_layers else 0.0
        return self.mtp_loss_coef

    def to_dict(self) -> dict[str, Any]:
        """All options, as in transformers, but no `auto_map` where it is empty."""
        options = super().to_dict()
        if not options.get("auto_map"):
            options.pop("auto_map", None)
        return options

    def check(self) -> None:
        """Raises a `ValueError` for options out of their range and for sizes that do not fit together."""
        # Ranges first, so that the comparisons below meet numbers that they can divide by.
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
            "initializer_range",
        )
        for least, names in ((1, positive), (0, not_negative)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not self.rms_norm_eps > 0:  # the state of a padding token is 0, and a norm would divide it by 0
            raise ValueError(f"`rms_norm_eps` must be above 0, got {self.rms_norm_eps}.")

        # Sizes that a layer's tensors would not fit: experts of a token, heads of a group, pairs of a head.
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

        # A weight for losses that nothing computes is a mistake, not a model without MTP.
        if self.mtp_loss_coef is not None and self.mtp_loss_coef < 0:
            raise ValueError(f"`mtp_loss_coef` must be at least 0, got {self.mtp_loss_coef}.")
        if self.mtp_loss_coef and not self.num_mtp_layers:
            raise ValueError(
                f"`mtp_loss_coef={self.mtp_loss_coef}` weighs the loss of MTP layers, but `num_mtp_layers` is 0. Set "
                "`num_mtp_layers` to 1 or more, or leave `mtp_loss_coef` out."
            )
