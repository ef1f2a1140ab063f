"""Bytes that autograd keeps between a Compass model's forward and its backward, tensor by tensor.

The counts are those of the grouped_mm experts, and of sdpa kernels that keep the scores' logsumexp but no scores:
flash, memory-efficient, the CPU's.

Shapes: B rows, L tokens of a row, T = B * L, H hidden size, E experts, K experts that a token takes, S = T * K, I
width of an expert, V vocabulary.
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
        gradients: Gradients of the weights.
        master: What the optimizer has of the weights in float32: a copy, or of bfloat16 weights the half that they
            lack; 0 where it has nothing.
        moments: Each of Adam's two moments.
        stream: The residual stream.
        compute: Inputs and outputs of matrix products.
        copies: Whether autocast copies the weights in the dtype of matrix products; autograd keeps these copies.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    stream: int
    compute: int
    copies: bool = False


MASTERS = "bf16-masters"
PRECISIONS = {
    "bf16-mixed": Precision(weights=4, gradients=4, master=0, moments=4, stream=4, compute=2, copies=True),
    "bf16": Precision(weights=2, gradients=2, master=4, moments=4, stream=2, compute=2),
    MASTERS: Precision(weights=2, gradients=2, master=2, moments=4, stream=2, compute=2),
    "bf16-pure": Precision(weights=2, gradients=2, master=0, moments=2, stream=2, compute=2),
    "float32": Precision(weights=4, gradients=4, master=0, moments=4, stream=4, compute=4),
}
"""`bf16-mixed` is autocast over float32 weights, as in transformers' Trainer with `bf16=True`. `bf16` is DeepSpeed's:
bfloat16 weights and gradients beside float32 master weights and moments. [`MASTERS`] is `otpo pretrain`'s on one GPU:
bfloat16 weights, and in the optimizer the other halves of their float32 masters. `bf16-pure` has everything in
bfloat16."""


@dataclass(frozen=True)
class Batch:
    """The rows that one forward reads.

    Attributes:
        rows: Number of rows on a device, B.
        length: Tokens of a row, L.
        packed: Whether rows hold several documents, which positions tell apart. Attention then takes a mask of
            numbers, and keys and values repeated for all heads; each layer keeps both.
    """

    rows: int
    length: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.rows * self.length


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one decoder layer keeps, by the part that keeps them.

    Attributes:
        attention: The norm before it, projections and sdpa.
        router: The norm before the MoE block and the router; the routers' losses are in [`Activations`]' `rest`.
        experts: Rows and hidden states of the routed experts.
        shared_experts: Hidden states of the shared experts.
        copies: Autocast's copies of the weights.
    """

    attention: int
    router: int
    experts: int
    shared_experts: int
    copies: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.attention + self.router + self.experts + self.shared_experts + self.copies


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward with a loss keeps.

    Attributes:
        layer: One decoder layer without gradient checkpointing.
        mtp_layer: One MTP layer without gradient checkpointing.
        kept_by_layer: One decoder layer as the setup has it: `layer.total`, or its input with gradient checkpointing.
        kept_by_mtp_layer: One MTP layer as the setup has it.
        head: The head's input and log-probabilities; the next token needs them once, and each MTP layer once.
        head_copy: Autocast's copies of the head's weights.
        rest: Last norm, rotary positions, masks and the routers' losses.
        total: Everything that exists when the forward ends.
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
    gathers: bool = False,
) -> Activations:
    """Counts the bytes that a training forward of `CompassForCausalLM` with labels keeps for its backward.

    The count leaves out parameters. MTP layers count where their loss has a weight.

    Args:
        config: The model.
        batch: The rows that it reads.
        precision: Bytes of weights and activations.
        gradient_checkpointing: Whether each layer keeps only its input.
        expert_parallel_size: Number of processes that share the experts. At an even load each process still computes S
            rows, but it copies fewer weights.
        gathers: Whether each process gets all tokens of those that share the experts. It then reserves rows for all of
            their slots, `expert_parallel_size * S`.
    """
    # The layers. An MTP layer's inner decoder layer reads a projection's result, so its stream has that dtype.
    tokens, hidden, length = batch.tokens, config.hidden_size, batch.length
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    spread = (expert_parallel_size, gathers)
    layer = _layer(config, batch, precision, precision.stream, *spread)
    inner = _layer(config, batch, precision, precision.compute, *spread)
    mtp = _mtp_layer(config, tokens, precision, inner)
    kept, kept_ahead = layer.total, mtp.total
    if gradient_checkpointing:
        # An MTP layer has two inputs. Where the dtypes are equal, the head keeps one of them already.
        separate = precision.stream != precision.compute
        kept = tokens * hidden * precision.stream
        kept_ahead = kept * (2 if separate else 1)

    # The heads. Where MTP detaches the head, autocast casts its weights once more for each MTP layer.
    head = tokens * (hidden * precision.compute + config.vocab_size * FLOAT + INDEX)
    head_copies = 1 + (ahead if config.mtp_detach_head else 0)
    head_copy = config.vocab_size * hidden * precision.compute * head_copies if precision.copies else 0

    # What no layer or head keeps. Rotary positions are the same for all rows unless rows are packed, and checkpointed
    # layers keep none of them but the mask, which their second forward reads.
    rows = batch.rows if batch.packed else 1
    rotary = 0 if gradient_checkpointing else 2 * rows * length * config.head_dim * precision.stream
    rest = _norm(tokens, hidden, precision.stream) + tokens * INDEX + (1 + ahead) * rotary
    if batch.packed and gradient_checkpointing:
        rest += batch.rows * length * length
    if config.router_aux_loss_coef or config.router_z_loss_coef:
        rest += (config.num_hidden_layers + ahead) * tokens * (2 * config.num_experts + 1) * FLOAT
    layers = config.num_hidden_layers * kept + ahead * kept_ahead
    total = layers + (1 + ahead) * head + head_copy + rest
    return Activations(layer, mtp, kept, kept_ahead, head, head_copy, rest, total)


def _norm(rows: int, width: int, input_bytes: int) -> int:
    """Bytes that an RMSNorm keeps: its input in float32, the inverse root, and their product in the input's dtype."""
    return rows * (width * FLOAT + FLOAT + width * input_bytes)


def _layer(
    config: CompassConfig, batch: Batch, precision: Precision, stream: int, expert_parallel_size: int, gathers: bool
) -> LayerActivations:
    """Bytes that one decoder layer keeps where a number of the residual stream has `stream` bytes."""
    tokens, hidden, head_dim, compute = batch.tokens, config.hidden_size, config.head_dim, precision.compute
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    casts = precision.copies  # under autocast each product keeps a cast of its own of the norm's float32 result

    # The norm and the inputs of three projections; norms of queries and keys; sdpa's four tensors and logsumexp.
    attention = _norm(tokens, hidden, stream) + tokens * hidden * compute * (3 if casts else 1)
    if config.use_qk_norm:
        attention += _norm(tokens * (heads + groups), head_dim, compute)
    kept_groups = heads if batch.packed else groups
    attention += tokens * (2 * heads + 2 * kept_groups) * head_dim * compute + tokens * heads * FLOAT
    if batch.packed:
        attention += batch.rows * batch.length**2 * compute

    # The norm; input and probabilities in float32, and indices; the weights' normalisation; the router in float32.
    slots = config.num_experts_per_tok
    router = _norm(tokens, hidden, stream) + tokens * (hidden + config.num_experts) * FLOAT + tokens * slots * INDEX
    if config.norm_topk_prob:
        router += tokens * (1 + slots) * FLOAT
    if precision.weights != FLOAT:
        router += config.num_experts * hidden * FLOAT

    # Three index tensors, and of each row the input, the output, four hidden vectors and the weight.
    width, rows = config.moe_intermediate_size, tokens * slots * (expert_parallel_size if gathers else 1)
    experts = rows * (3 * INDEX + compute * (2 * hidden + 4 * width + 1))

    # Four hidden vectors of each token, and casts of the input where the router reads it in float32.
    shared_width = config.num_shared_experts * width
    shared = 4 * tokens * shared_width * compute
    if shared_width and compute != FLOAT:
        shared += tokens * hidden * compute * (2 if casts else 1)

    # Autocast casts no router and no norm.
    counts = count_layer(config)
    copies = counts.attention + counts.experts // expert_parallel_size + counts.shared_experts
    return LayerActivations(attention, router, experts, shared, copies * compute if casts else 0)


def _mtp_layer(config: CompassConfig, tokens: int, precision: Precision, inner: LayerActivations) -> LayerActivations:
    """Bytes that one MTP layer keeps: the inner decoder layer's, and those of the norms and projection around it."""
    hidden = config.hidden_size
    outer = 2 * _norm(tokens, hidden, precision.stream) + _norm(tokens, hidden, precision.compute)
    outer += tokens * 2 * hidden * precision.compute
    if precision.compute == FLOAT:
        outer -= tokens * hidden * FLOAT  # the layer and the head read the same state, which is kept once
    copies = 2 * hidden * hidden * precision.compute if precision.copies else 0
    return LayerActivations(
        inner.attention + outer, inner.router, inner.experts, inner.shared_experts, inner.copies + copies
    )
