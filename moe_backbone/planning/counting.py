"""Parameters and floating-point operations of a Compass model, by arithmetic on its configuration."""

from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters of a causal language model, by part.

    Attributes:
        embeddings: Embedding table.
        head: Output head; 0 where the embedding table is the head.
        attention: Projections of the decoder layers, biases included.
        routers: Routers of the decoder layers.
        experts: Routed experts of the decoder layers.
        shared_experts: Shared experts of the decoder layers.
        norms: Norms of the decoder layers, also of queries and keys, and the last norm.
        mtp: Whole MTP layers. Published sizes leave them out, and so do `total` and `active`.
        active_experts: The routed experts that one token takes, a part of `experts`.
    """

    embeddings: int
    head: int
    attention: int
    routers: int
    experts: int
    shared_experts: int
    norms: int
    mtp: int
    active_experts: int

    @property
    def total(self) -> int:
        """Parameters without MTP layers."""
        return self.embeddings + self.head + self.experts + self._dense

    @property
    def active(self) -> int:
        """Parameters that take part in one token's forward, embeddings included, without MTP layers."""
        return self.embeddings + self.head + self.active_experts + self._dense

    @property
    def trained(self) -> int:
        """All parameters of the model, MTP layers included, which are frozen at `mtp_loss_coef=0`."""
        return self.total + self.mtp

    @property
    def _dense(self) -> int:
        return self.attention + self.routers + self.shared_experts + self.norms


@dataclass(frozen=True)
class LayerCounts:
    """Number of parameters of one decoder layer, by part as in [`ParameterCounts`]."""

    attention: int
    router: int
    experts: int
    shared_experts: int
    norms: int

    @property
    def total(self) -> int:
        """Parameters of all parts."""
        return self.attention + self.router + self.experts + self.shared_experts + self.norms


def count_layer(config: CompassConfig) -> LayerCounts:
    """Counts the parameters of one decoder layer."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    biases = queries + 2 * keys + hidden if config.attention_bias else 0
    return LayerCounts(
        attention=2 * hidden * (queries + keys) + biases,
        router=config.num_experts * hidden,
        experts=3 * hidden * width * config.num_experts,
        shared_experts=3 * hidden * width * config.num_shared_experts,
        norms=2 * hidden + (2 * config.head_dim if config.use_qk_norm else 0),
    )


def count_parameters(config: CompassConfig) -> ParameterCounts:
    """Counts the parameters of `CompassForCausalLM(config)`."""
    layer, layers, hidden = count_layer(config), config.num_hidden_layers, config.hidden_size
    table = config.vocab_size * hidden
    joining = 2 * hidden * hidden + 3 * hidden  # an MTP layer adds a projection and three norms
    return ParameterCounts(
        embeddings=table,
        head=0 if config.tie_word_embeddings else table,
        attention=layers * layer.attention,
        routers=layers * layer.router,
        experts=layers * layer.experts,
        shared_experts=layers * layer.shared_experts,
        norms=layers * layer.norms + hidden,
        mtp=config.num_mtp_layers * (layer.total + joining),
        active_experts=layers * layer.experts * config.num_experts_per_tok // config.num_experts,
    )


@dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations for one token, by part. A multiply-add counts as two.

    Attributes:
        dense: Projections of attention and of MTP layers, routers, shared experts.
        experts: Routed experts.
        scores: Attention scores and their product with the values, without the half that the causal mask hides.
        head: Output head, once for the next token and once for each MTP layer that learns.
    """

    dense: float
    experts: float
    scores: float
    head: float

    @property
    def total(self) -> float:
        """Operations of all parts."""
        return self.dense + self.experts + self.scores + self.head


def count_flops(config: CompassConfig, sequence_length: int, training: bool = True) -> FlopCounts:
    """Counts FLOPs for one token by part, as PaLM's appendix B does (arXiv 2204.02311).

    Each parameter of a matrix product costs a token 2 FLOPs forward and 4 backward. In each layer, queries times keys
    and probabilities times values cost a token `4 * heads * head_dim * sequence_length` forward, and twice as much
    backward. PaLM counts all of this; we count half, since attention kernels skip the half that the causal mask hides.
    MTP layers count in training where their loss has a weight; `mtp_detach_head` saves them the gradient of the head's
    weights. The count leaves out norms, activations, softmax, the embedding lookup, and the second forward of gradient
    checkpointing. The rest is the model's FLOPs, by which model FLOPs utilisation (MFU) is defined.

    Args:
        config: The model.
        sequence_length: Number of tokens that attend to each other, L. In packed rows this is a document's length.
        training: Whether to count the backward pass and the MTP layers.
    """
    layer, hidden = count_layer(config), config.hidden_size
    biases = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim + hidden
    projections = layer.attention - (biases if config.attention_bias else 0)
    learning = training and bool(config.effective_mtp_loss_coef)
    ahead = config.num_mtp_layers if learning else 0
    layers, passes = config.num_hidden_layers + ahead, 6 if training else 2
    head = config.vocab_size * hidden
    dense = layers * (projections + layer.router + layer.shared_experts) + ahead * 2 * hidden * hidden
    experts = layers * layer.experts * config.num_experts_per_tok // config.num_experts
    scores = layers * config.num_attention_heads * config.head_dim * sequence_length
    return FlopCounts(
        dense=passes * dense,
        experts=passes * experts,
        scores=passes * scores,
        head=head * (passes + ahead * (4 if config.mtp_detach_head else 6)),
    )


def flops_per_token(config: CompassConfig, sequence_length: int, training: bool = True) -> float:
    """Counts FLOPs for one token; see [`count_flops`].

    Args:
        config: The model.
        sequence_length: Number of tokens that attend to each other.
        training: Whether to count the backward pass and the MTP layers.
    """
    return count_flops(config, sequence_length, training).total
