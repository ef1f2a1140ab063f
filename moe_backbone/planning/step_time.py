"""Estimated time of a training step: operations over the device's rate plus bytes over its bandwidths.

The estimate adds up all parts, as if none ran beside another. It is of the step that `otpo pretrain` runs on a GPU by
default: compiled layers, attention by documents' lengths, and nobody who waits. Memory is planned for layers that are
not compiled and a mask in packed rows, so it is a bound of that step's.
Legend: T tokens of a micro-batch, K experts that a token takes, H hidden size, R bytes of T rows of H numbers, and
N = K R.
"""

from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig

from .activations import FLOAT, INDEX, saved_activations
from .counting import count_flops
from .hardware import GPU
from .host_time import eager_bytes, engine_bytes, host_time
from .memory import dense_parameters, routed_experts
from .setup import TrainingSetup

FLASH4 = 0.6
"""Time of FlashAttention-4's kernels, as a share of that of torch's: half to two thirds, measured on an H100."""


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet's rates that a plan assumes a run to reach.

    Attributes:
        matmul: Share of the dense bfloat16 rate that matrix products reach. We measured grouped_mm of 65536 x 4096 x
            14336 at 713 of 989 TFLOP/s on an H100; smaller products reach less.
        attention: Share of the same rate that attention's kernel reaches, its second computation of the scores in the
            backward not counted. We measured 0.21 and 0.22 on an H100, of torch's flash kernel over rows of 4096
            tokens with heads of 64 and of 128 numbers.
        bandwidth: Share of the memory's bandwidth. We measured copies at 3.0 of 3.35 TB/s on an H100.
        links: Share of the bandwidth between GPUs. We did not measure it.
        elementwise: Share of the memory's bandwidth that operations of layers that are not compiled reach, by the
            bytes that they are counted to move: casts, norms, sums and moves of rows in many kernels. We measured 0.47
            to 0.65 on two H200, as these kernels' time beside that of matrix products, and 0.46 to 0.6 in whole steps
            on one (transformers 5.23, 28 November 2026).
        launch: Seconds of the host for one operation that Python launches, if it is not compiled. A step of
            compass-small with one row of 4096 tokens, whose forward waits for the host, took 96.7 ms on an H200's
            machine (transformers 5.23, 28 November 2026). Hosts of one kind differ by 1.3 times.

    Raises:
        ValueError: A share is not above 0 and at most 1.
    """

    matmul: float = 0.72
    attention: float = 0.21
    bandwidth: float = 0.9
    links: float = 0.8
    elementwise: float = 0.55
    launch: float = 38e-6

    def __post_init__(self) -> None:
        if not 0 <= self.launch < 1:
            raise ValueError(f"`launch` is in seconds, at least 0 and below 1, got {self.launch}.")
        for name, value in vars(self).items():
            if name == "launch":
                continue
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` is a share of a data sheet's rate, above 0 and at most 1, got {value}.")


@dataclass(frozen=True)
class Exchange:
    """Bytes that one GPU sends to others in one layer and micro-batch.

    Attributes:
        forward: Rows, or all tokens, on their way to the experts and back.
        backward: Their gradients. Gradient checkpointing repeats the forward beside it.
        kind: `all_to_all` or `gather`.
    """

    forward: int
    backward: int
    kind: str = "all_to_all"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part.

    Attributes:
        matmul: Matrix products, the second forward of gradient checkpointing included.
        attention: Scores and their product with the values, the second forward included.
        row_moves: Moves of rows to the experts' order and back, if each row is read once and written once.
        elementwise: Norms, activations, casts and the loss, by the bytes that they write and read.
        all_to_all: Moves of rows, or of all tokens where they are gathered, to the GPUs with the experts and back.
        gradients: Collectives of data parallelism and ZeRO.
        optimizer: Reads and writes of the optimizer.
        engine: DeepSpeed's copies, checks and casts of gradients and weights.
        waiting: Time in which the device waits for the host.
    """

    matmul: float
    attention: float
    row_moves: float
    elementwise: float
    all_to_all: float
    gradients: float
    optimizer: float
    engine: float
    waiting: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(vars(self).values())


def exchange(config: CompassConfig, setup: TrainingSetup) -> Exchange:
    """Bytes of the exchange that the setup takes: [`gathered`] or [`all_to_all`]."""
    return (gathered if setup.gathers(config) else all_to_all)(config, setup)


def gathered(config: CompassConfig, setup: TrainingSetup) -> Exchange:
    """Bytes that one GPU sends where all that share its experts, W, gather their tokens.

    The forward gathers states, weights and experts' indices, and scatters sums of states. The backward gathers
    gradients of these sums, and scatters those of states and weights. Each of these sends `W - 1` times a GPU's
    own tokens.
    """
    size, others = setup.bytes_of.compute, (setup.expert_parallel_size - 1) * setup.batch.tokens
    states, slots = 2 * config.hidden_size * size, config.num_experts_per_tok
    return Exchange(others * (states + slots * (size + INDEX)), others * (states + slots * size), "gather")


def all_to_all(config: CompassConfig, setup: TrainingSetup) -> Exchange:
    """Bytes that one GPU sends to those that share its experts.

    At an even load each pass sends `2 N (1 - 1 / expert_parallel_size)`: the rows of other GPUs' experts, there and
    back.
    """
    rows = setup.batch.tokens * config.num_experts_per_tok
    leaving = rows - rows // setup.expert_parallel_size
    one_pass = 2 * leaving * config.hidden_size * setup.bytes_of.compute
    return Exchange(forward=one_pass, backward=one_pass)


def row_move_bytes(config: CompassConfig, setup: TrainingSetup) -> int:
    """Least bytes that permute and unpermute move in one layer and micro-batch, forward and backward.

    Each pass moves `2 (R + N)`, and the backward N more, where it reads experts' outputs or tokens' rows once more; in
    compiled layers of memcpy it reads neither. Where rows are sent, each pass also reorders those that arrive, and
    back: `4 N`. Where all tokens are gathered, R is that of all GPUs that share the experts.
    """
    row = setup.batch.tokens * config.hidden_size * setup.bytes_of.compute
    rows = row * config.num_experts_per_tok
    again = 4 * rows if setup.expert_parallel_size > 1 and not setup.gathers(config) else 0
    row *= setup.expert_parallel_size if setup.gathers(config) else 1
    forward = 2 * (row + rows) + again
    alone = setup.expert_parallel_size == 1 and setup.experts_implementation == "memcpy"
    backward = forward + (0 if alone and setup.compiles(config) else rows)
    return forward * (2 if setup.gradient_checkpointing else 1) + backward


def estimate_step(config: CompassConfig, setup: TrainingSetup, gpu: GPU, rates: Rates) -> StepTime:
    """Estimates the time of one step: all micro-batches and the optimizer.

    Args:
        config: The model.
        setup: The options of the run.
        gpu: The GPUs that it runs on.
        rates: Shares of the GPU's rates that the run reaches.
    """
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    layers, micro_batches = config.num_hidden_layers + ahead, setup.gradient_accumulation_steps
    tokens = setup.batch.tokens * micro_batches
    again = 4 / 3 if setup.gradient_checkpointing else 1.0
    flops = count_flops(config, setup.sequence_length)
    peak = 1e12 * (gpu.float32_tflops if setup.bytes_of.compute == FLOAT else gpu.tflops)
    bandwidth = gpu.bandwidth * 1e9 * rates.bandwidth
    sent = exchange(config, setup)
    forwards = 2 if setup.gradient_checkpointing else 1
    exchanged = (forwards * sent.forward + sent.backward) * layers * micro_batches
    faster = FLASH4 if setup.attention_kernels == "flash4" else 1.0
    layers_bytes, heads_bytes = _elementwise_bytes(config, setup, forwards)
    slower = bandwidth if setup.compiles(config) else gpu.bandwidth * 1e9 * rates.elementwise
    heads = {
        "matmul": tokens * flops.head / (peak * rates.matmul),
        "elementwise": micro_batches * heads_bytes / bandwidth,
    }
    in_layers = {
        "matmul": tokens * (flops.dense + flops.experts) * again / (peak * rates.matmul),
        "attention": tokens * flops.scores * again / (peak * rates.attention) * faster,
        "row_moves": layers * micro_batches * row_move_bytes(config, setup) / bandwidth,
        "elementwise": micro_batches * layers_bytes / slower,
        "all_to_all": exchanged / (gpu.intra_node * 1e9 * rates.links),
    }
    gradients = _collectives(config, setup, gpu) / rates.links

    # The host starts a step with nothing launched ahead. A layer's backward takes twice as long as its forward.
    of_all, of_heads = (sum(each.values()) / micro_batches for each in (in_layers, heads))
    first = of_all / (forwards + 2)
    waiting = host_time(config, setup, rates.launch).waiting(
        first, of_heads, of_all - first + gradients / micro_batches, micro_batches
    )
    return StepTime(
        **{name: value + heads.get(name, 0.0) for name, value in in_layers.items()},
        gradients=gradients,
        optimizer=_optimizer_bytes(config, setup) / bandwidth,
        engine=engine_bytes(config, setup) / bandwidth,
        waiting=waiting,
    )


def _elementwise_bytes(config: CompassConfig, setup: TrainingSetup, forwards: int) -> tuple[float, float]:
    """Bytes that elementwise operations move in one micro-batch, in layers and in heads with their losses.

    Each pass writes and reads every tensor that autograd keeps, or its gradient. A head's loss takes ten such moves.
    """
    kept = saved_activations(
        config,
        setup.batch,
        setup.bytes_of,
        expert_parallel_size=setup.expert_parallel_size,
        gathers=setup.gathers(config),
    )
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    if not setup.compiles(config):
        return eager_bytes(config, setup), 10 * (1 + ahead) * kept.head
    copies = config.num_hidden_layers * kept.layer.copies + ahead * kept.mtp_layer.copies
    layers = config.num_hidden_layers * kept.layer.total + ahead * kept.mtp_layer.total - copies
    casts = 3 * copies * (forwards + 1)  # 2 bytes beside 4: a cast writes 2, its gradient writes 4
    return 2 * layers * (forwards + 1) + casts, 10 * (1 + ahead) * kept.head


def _collectives(config: CompassConfig, setup: TrainingSetup, gpu: GPU) -> float:
    """Seconds of the collectives at full rate.

    A ring over several nodes uses the ports of all its GPUs in a node.
    """
    size, micro_batches = setup.bytes_of, setup.gradient_accumulation_steps
    groups = [
        (dense_parameters(config), setup.world, setup.gpus_per_node),
        (
            routed_experts(config) / setup.expert_parallel_size,
            setup.expert_replicas,
            setup.gpus_per_node // setup.expert_parallel_size,
        ),
    ]
    # An all-reduce counts twice. DeepSpeed's stages 1 and 2 take one for each bucket, its default
    # (`use_multi_rank_bucket_allreduce`).
    reduces = {0: 2, 1: 2, 2: 2 * micro_batches, 3: micro_batches}[setup.stage]
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[setup.stage]
    seconds = 0.0
    for parameters, members, of_a_node in groups:
        sent = parameters * (reduces * size.gradients + gathers * size.weights) * (1 - 1 / members)
        rate = gpu.intra_node if setup.nodes == 1 else min(gpu.intra_node, of_a_node * gpu.inter_node)
        seconds += sent / (rate * 1e9)
    return seconds


def _optimizer_bytes(config: CompassConfig, setup: TrainingSetup) -> float:
    """Bytes that one optimizer step moves on a GPU.

    The step reads and writes moments and float32 weights, and reads gradients twice: for their norm and to apply them.
    """
    size = setup.bytes_of
    experts = routed_experts(config)
    if setup.stage:
        local = dense_parameters(config) / setup.world + experts / setup.world
    else:
        local = dense_parameters(config) + experts / setup.expert_parallel_size
    halves = size.master == size.weights
    weights = 2 * size.master + (2 if halves or not size.master else 1) * size.weights
    return local * (2 * 2 * setup.moment + weights + 2 * size.gradients)
