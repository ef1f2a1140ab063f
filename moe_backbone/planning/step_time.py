"""Time of a training step, estimated: operations over the device's rate, bytes over its bandwidths, one after another.

Legend: T tokens of a micro-batch, K experts that a token takes, H hidden size, R = T rows of H numbers, N = K * R.
"""

from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig

from .activations import FLOAT, saved_activations
from .counting import count_flops
from .hardware import GPU
from .memory import dense_parameters, routed_experts
from .setup import TrainingSetup


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet's rates that a run is assumed to reach.

    Attributes:
        matmul: Of the dense bfloat16 rate in matrix products. Measured: grouped_mm of 65536 x 4096 x 14336 at 713 of
            989 TFLOP/s on an H100; smaller products reach less.
        attention: Of the same in attention's kernel. Not measured: half of the above, since its backward computes the
            scores again.
        bandwidth: Of memory's. Measured: 3.0 of 3.35 TB/s, copies on an H100.
        links: Of the links between GPUs. Not measured.
    """

    matmul: float = 0.72
    attention: float = 0.36
    bandwidth: float = 0.9
    links: float = 0.8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` is a share of a data sheet's rate, above 0 and at most 1, got {value}.")


@dataclass(frozen=True)
class AllToAll:
    """Bytes that a GPU sends in one layer and micro-batch, what stays on it left out.

    Attributes:
        forward: Dispatch and combine.
        backward: Their gradients; gradient checkpointing repeats the forward beside it.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, none of which is assumed to hide behind another.

    Attributes:
        matmul: Matrix products, gradient checkpointing's second forward included.
        attention: Scores and their product with the values, likewise.
        row_moves: To the experts' order and back, at the floor: rows read once and written once.
        elementwise: Norms, activations, casts, loss, by the bytes that they write and read.
        all_to_all: Rows to the GPUs that hold their experts and back.
        gradients: Collectives of data parallelism and ZeRO.
        optimizer: Its reads and writes.
    """

    matmul: float
    attention: float
    row_moves: float
    elementwise: float
    all_to_all: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def all_to_all(config: CompassConfig, setup: TrainingSetup) -> AllToAll:
    """Bytes between the GPUs that share the experts, at an even load: `2 N (1 - 1 / expert_parallel_size)` a pass."""
    rows = setup.batch.tokens * config.num_experts_per_tok
    leaving = rows - rows // setup.expert_parallel_size
    one_pass = 2 * leaving * config.hidden_size * setup.bytes_of.compute
    return AllToAll(forward=one_pass, backward=one_pass)


def row_move_bytes(config: CompassConfig, setup: TrainingSetup) -> int:
    """Bytes that permute and unpermute move at least in one layer and micro-batch, forward and backward.

    Forward `2 (R + N)`. Backward `(R + N) + (R + 2 N)`, since the weights' gradient reads the experts' rows again.
    Expert parallelism orders the rows that arrive once more, and back: `4 N` a pass.
    """
    row = setup.batch.tokens * config.hidden_size * setup.bytes_of.compute
    rows = row * config.num_experts_per_tok
    again = 4 * rows if setup.expert_parallel_size > 1 else 0
    forward, backward = 2 * (row + rows) + again, 2 * row + 3 * rows + again
    return forward * (2 if setup.gradient_checkpointing else 1) + backward


def estimate_step(config: CompassConfig, setup: TrainingSetup, gpu: GPU, rates: Rates) -> StepTime:
    """Time of a step of the optimizer.

    Args:
        config: The model.
        setup: How it is trained.
        gpu: On what.
        rates: Shares of its rates.
    """
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    layers, micro_batches = config.num_hidden_layers + ahead, setup.gradient_accumulation_steps
    tokens = setup.batch.tokens * micro_batches
    again = 4 / 3 if setup.gradient_checkpointing else 1.0
    flops = count_flops(config, setup.sequence_length)
    peak = 1e12 * (gpu.float32_tflops if setup.bytes_of.compute == FLOAT else gpu.tflops)
    scores = flops.scores * (2 if setup.packed else 1)  # a mask of numbers lets a kernel skip nothing
    bandwidth = gpu.bandwidth * 1e9 * rates.bandwidth
    exchange = all_to_all(config, setup)
    forwards = 2 if setup.gradient_checkpointing else 1
    exchanged = (forwards * exchange.forward + exchange.backward) * layers * micro_batches
    return StepTime(
        matmul=tokens * ((flops.dense + flops.experts) * again + flops.head) / (peak * rates.matmul),
        attention=tokens * scores * again / (peak * rates.attention),
        row_moves=layers * micro_batches * row_move_bytes(config, setup) / bandwidth,
        elementwise=micro_batches * _elementwise_bytes(config, setup, forwards) / bandwidth,
        all_to_all=exchanged / (gpu.intra_node * 1e9 * rates.links),
        gradients=_collectives(config, setup, gpu) / rates.links,
        optimizer=_optimizer_bytes(config, setup) / bandwidth,
    )


def _elementwise_bytes(config: CompassConfig, setup: TrainingSetup, forwards: int) -> float:
    """What autograd keeps is written and read in each forward, and so are its gradients; a head's loss ten times."""
    kept = saved_activations(config, setup.batch, setup.bytes_of, expert_parallel_size=setup.expert_parallel_size)
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    copies = config.num_hidden_layers * kept.layer.copies + ahead * kept.mtp_layer.copies
    layers = config.num_hidden_layers * kept.layer.total + ahead * kept.mtp_layer.total - copies
    casts = 3 * copies * (forwards + 1)  # a cast reads 4 bytes for 2 that it writes, a gradient's the other way round
    return 2 * layers * (forwards + 1) + casts + 10 * (1 + ahead) * kept.head


def _collectives(config: CompassConfig, setup: TrainingSetup, gpu: GPU) -> float:
    """Seconds at full rate. Rings between nodes use the ports of all GPUs of a node that are in the same ring."""
    size, micro_batches = setup.bytes_of, setup.gradient_accumulation_steps
    groups = [
        (dense_parameters(config), setup.world, setup.gpus_per_node),
        (
            routed_experts(config) / setup.expert_parallel_size,
            setup.expert_replicas,
            setup.gpus_per_node // setup.expert_parallel_size,
        ),
    ]
    reduces = {0: 2, 1: 1, 2: micro_batches, 3: micro_batches}[setup.stage]  # an all-reduce counts twice
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[setup.stage]
    seconds = 0.0
    for parameters, members, of_a_node in groups:
        sent = parameters * (reduces * size.gradients + gathers * size.weights) * (1 - 1 / members)
        rate = gpu.intra_node if setup.nodes == 1 else min(gpu.intra_node, of_a_node * gpu.inter_node)
        seconds += sent / (rate * 1e9)
    return seconds


def _optimizer_bytes(config: CompassConfig, setup: TrainingSetup) -> float:
    """Moments and float32 weights are read and written; gradients read twice, for their norm and for the step."""
    size = setup.bytes_of
    experts = routed_experts(config)
    if setup.stage:
        local = dense_parameters(config) / setup.world + experts / setup.world
    else:
        local = dense_parameters(config) + experts / setup.expert_parallel_size
    weights = 2 * size.master + size.weights if size.master else 2 * size.weights
    return local * (2 * 2 * setup.moment + weights + 2 * size.gradients)
