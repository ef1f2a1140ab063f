"""Bytes that autograd keeps between a Compass model's forward and its backward, tensor by tensor.

It is what PyTorch saves with the grouped_mm experts, and sdpa in a kernel that keeps no scores but their logsumexp
(flash, memory-efficient, the CPU's). Legend: B rows, L tokens of a row, T = B * L, H hidden size, E experts, K experts
that a token takes, S = T * K, I expert width, V vocabulary.
"""

from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig

from .counting import count_layer

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class Precision:
    """Bytes of a number in each role.

    Attributes:
        weights: Weights of the model.
        gradients: Their gradients.
        master: Float32 copy of the weights for the optimizer; 0 for none.
        moments: Each of Adam's two moments.
        stream: The residual stream.
        compute: Inputs and outputs of matrix products.
        copies: Whether autocast makes copies of the weights in the products' dtype, which autograd keeps.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    stream: int
    compute: int
    copies: bool = False


PRECISIONS = {
    "bf16-mixed": Precision(weights=4, gradients=4, master=0, moments=4, stream=4, compute=2, copies=True),
    "bf16": Precision(weights=2, gradients=2, master=4, moments=4, stream=2, compute=2),
    "bf16-pure": Precision(weights=2, gradients=2, master=0, moments=2, stream=2, compute=2),
    "float32": Precision(weights=4, gradients=4, master=0, moments=4, stream=4, compute=4),
}
"""`bf16-mixed`: autocast over float32 weights, transformers' Trainer with `bf16=True`. `bf16`: bfloat16 weights and
gradients beside float32 master weights and moments, as DeepSpeed keeps them. `bf16-pure`: everything in bfloat16."""


@dataclass(frozen=True)
class Batch:
    """What one forward sees.

    Attributes:
        rows: Rows on a device, B.
        length: Tokens of a row, L.
        packed: Whether rows hold several documents, told apart by their positions. Attention then gets a mask, which
            each layer keeps as numbers, and keys and values repeated for all heads.
    """

    rows: int
    length: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """B * L."""
        return self.rows * self.length


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one decoder layer keeps.

    Attributes:
        attention: Norm, projections, sdpa.
        router: Norm, router and its losses.
        experts: Rows and hidden states of the routed experts.
        shared_experts: Hidden states of the shared ones.
        copies: Autocast's copies of the weights.
    """

    attention: int
    router: int
    experts: int
    shared_experts: int
    copies: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.router + self.experts + self.shared_experts + self.copies


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward with loss keeps.

    Attributes:
        layer: One decoder layer, not checkpointed.
        mtp_layer: One MTP layer, not checkpointed.
        kept_by_layer: What one decoder layer keeps: all of it, or with gradient checkpointing its input.
        kept_by_mtp_layer: The same for an MTP layer.
        head: Input of the head and log-probabilities, once for the next token and once for each MTP layer.
        head_copy: Autocast's copy of the head's weights.
        rest: Last norm, rotary positions, masks and router losses.
        total: Everything that is kept when the forward ends.
    """

    layer: LayerActivations
    mtp_layer: LayerActivations
    kept_by_layer: int
    kept_by_mtp_layer: int
    head: int
    head_copy: int
    rest: int
    total: int


def saved_activations(
    config: CompassConfig,
    batch: Batch,
    precision: Precision,
    *,
    gradient_checkpointing: bool = False,
    expert_parallel_size: int = 1,
) -> Activations:
    """What a training forward of `CompassForCausalLM` with labels keeps for its backward.

    Parameters are left out. MTP layers count if their loss weighs something.

    Args:
        config: The model.
        batch: What it sees.
        precision: Of weights and activations.
        gradient_checkpointing: Whether each layer keeps its input alone.
        expert_parallel_size: Processes that share the experts. At an even load each still gets S rows; it copies
            fewer weights.
    """
    tokens, hidden, length = batch.tokens, config.hidden_size, batch.length
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    layer = _layer(config, batch, precision, precision.stream, expert_parallel_size)
    inner = _layer(config, batch, precision, precision.compute, expert_parallel_size)
    mtp = _mtp_layer(config, tokens, precision, inner)
    separate = precision.stream != precision.compute  # else the head keeps what an MTP layer reads
    kept, kept_ahead = layer.total, mtp.total
    if gradient_checkpointing:
        kept = tokens * hidden * precision.stream
        kept_ahead = kept * (2 if separate else 1)
    head = tokens * (hidden * precision.compute + config.vocab_size * FLOAT + INDEX)
    head_copies = 1 + (ahead if config.mtp_detach_head else 0)
    head_copy = config.vocab_size * hidden * precision.compute * head_copies if precision.copies else 0

    rows = batch.rows if batch.packed else 1
    rotary = 0 if gradient_checkpointing else 2 * rows * length * config.head_dim * precision.stream
    rest = _norm(tokens, hidden, precision.stream) + tokens * INDEX + (1 + ahead) * rotary
    if batch.packed and gradient_checkpointing:  # the mask itself, for the second forward
        rest += batch.rows * length * length
    if config.router_aux_loss_coef or config.router_z_loss_coef:
        rest += (config.num_hidden_layers + ahead) * 2 * tokens * (config.num_experts + 1) * FLOAT
    layers = config.num_hidden_layers * kept + ahead * kept_ahead
    total = layers + (1 + ahead) * head + head_copy + rest
    return Activations(layer, mtp, kept, kept_ahead, head, head_copy, rest, total)


def _norm(rows: int, width: int, input_bytes: int) -> int:
    """RMSNorm: its input in float32, the inverse root, and the product of both in the input's dtype."""
    return rows * (width * FLOAT + FLOAT + width * input_bytes)


def _layer(
    config: CompassConfig, batch: Batch, precision: Precision, stream: int, expert_parallel_size: int
) -> LayerActivations:
    tokens, hidden, head_dim, compute = batch.tokens, config.hidden_size, config.head_dim, precision.compute
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    casts = precision.copies  # each product then keeps a cast of its own of the norm's float32 result

    attention = _norm(tokens, hidden, stream) + tokens * hidden * compute * (3 if casts else 1)
    attention += _norm(tokens * (heads + groups), head_dim, compute)
    kept_groups = heads if batch.packed else groups
    attention += tokens * (2 * heads + 2 * kept_groups) * head_dim * compute + tokens * heads * FLOAT
    if batch.packed:
        attention += batch.rows * batch.length**2 * compute

    slots = config.num_experts_per_tok
    router = _norm(tokens, hidden, stream) + tokens * (hidden + config.num_experts) * FLOAT + tokens * slots * INDEX
    if config.norm_topk_prob:
        router += tokens * (1 + slots) * FLOAT
    if precision.weights != FLOAT:
        router += config.num_experts * hidden * FLOAT

    width, rows = config.moe_intermediate_size, tokens * slots
    experts = rows * (3 * INDEX + compute * (2 * hidden + 4 * width + 1))

    shared_width = config.num_shared_experts * width
    shared = 4 * tokens * shared_width * compute
    if shared_width and compute != FLOAT:
        shared += tokens * hidden * compute * (2 if casts else 1)

    counts = count_layer(config)
    copies = counts.attention + counts.experts // expert_parallel_size + counts.shared_experts
    return LayerActivations(attention, router, experts, shared, copies * compute if casts else 0)


def _mtp_layer(config: CompassConfig, tokens: int, precision: Precision, inner: LayerActivations) -> LayerActivations:
    """The decoder layer, whose stream is the projection's result, and what stands before and after it."""
    hidden = config.hidden_size
    outer = 2 * _norm(tokens, hidden, precision.stream) + _norm(tokens, hidden, precision.compute)
    outer += tokens * 2 * hidden * precision.compute
    if precision.compute == FLOAT:
        outer -= tokens * hidden * FLOAT  # the state that it reads is the head's input too
    copies = 2 * hidden * hidden * precision.compute if precision.copies else 0
    return LayerActivations(
        inner.attention + outer, inner.router, inner.experts, inner.shared_experts, inner.copies + copies
    )
