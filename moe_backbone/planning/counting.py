"""Parameters and floating-point operations of a Compass model, by arithmetic: no tensor is made."""

from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a causal language model by part.

    Attributes:
        embeddings: Embedding table.
        head: Output head; 0 when it is the embedding table.
        attention: Projections of the decoder layers, biases included.
        routers: Routers of the decoder layers.
        experts: Routed experts of the decoder layers.
        shared_experts: Shared experts of the decoder layers.
        norms: Norms of the decoder layers, of queries and keys too, and the last norm.
        mtp: All of the MTP layers. Published sizes leave them out, and so do `total` and `active`.
        active_experts: Of `experts`, those that a token takes.
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
        """Parameters that a token meets, embeddings included, without MTP layers."""
        return self.embeddings + self.head + self.active_experts + self._dense

    @property
    def trained(self) -> int:
        """Parameters with MTP layers: what the model holds. At `mtp_loss_coef=0` the latter are frozen."""
        return self.total + self.mtp

    @property
    def _dense(self) -> int:
        return self.attention + self.routers + self.shared_experts + self.norms


@dataclass(frozen=True)
class LayerCounts:
    """Parameters of one decoder layer, by part as in [`ParameterCounts`]."""

    attention: int
    router: int
    experts: int
    shared_experts: int
    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.router + self.experts + self.shared_experts + self.norms


def count_layer(config: CompassConfig) -> LayerCounts:
    """Parameters of one decoder layer."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    biases = queries + 2 * keys + hidden if config.attention_bias else 0
    return LayerCounts(
        attention=2 * hidden * (queries + keys) + biases,
        router=config.num_experts * hidden,
        experts=3 * hidden * width * config.num_experts,
        shared_experts=3 * hidden * width * config.num_shared_experts,
        norms=2 * hidden + 2 * config.head_dim,
    )


def count_parameters(config: CompassConfig) -> ParameterCounts:
    """Parameters of `CompassForCausalLM(config)`."""
    layer, layers, hidden = count_layer(config), config.num_hidden_layers, config.hidden_size
    table = config.vocab_size * hidden
    joining = 2 * hidden * hidden + 3 * hidden  # of an MTP layer: its projection and three more norms
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
    """Floating-point operations for a token by part, a multiply-add counted as two.

    Attributes:
        dense: Projections of attention and of MTP layers, routers, shared experts.
        experts: Routed experts.
        scores: Attention scores and their product with the values, the masked half left out.
        head: Output head, once for the next token and once for each MTP layer that learns.
    """

    dense: float
    experts: float
    scores: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts + self.scores + self.head


def count_flops(config: CompassConfig, sequence_length: int, training: bool = True) -> FlopCounts:
    """FLOPs for a token by part, as PaLM's appendix B counts them (arXiv 2204.02311).

    Each parameter that a token is multiplied with costs 2 forward and 4 backward. Queries times keys and
    probabilities times values cost `4 * heads * head_dim * sequence_length` a layer and token forward, twice that
    backward; PaLM counts all of it, we count half, since the mask is causal and attention kernels skip what it hides.
    MTP layers count in training when their loss weighs something; `mtp_detach_head` saves them the gradient of the
    head's weights. Norms, activations, softmax and the embedding lookup are left out, and so is what gradient
    checkpointing computes again: these are the model's FLOPs, which model FLOPs utilisation (MFU) is about.

    Args:
        config: The model.
        sequence_length: Tokens that attend to each other, L. In packed rows that is a document's length.
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
    """FLOPs for a token; see [`count_flops`].

    Args:
        config: The model.
        sequence_length: Tokens that attend to each other.
        training: Whether to count the backward pass and the MTP layers.
    """
    return count_flops(config, sequence_length, training).total
