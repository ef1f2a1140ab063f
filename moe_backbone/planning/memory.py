"""Memory of a GPU in a training step: what stands there always, and when the rest is largest.

The step is followed backwards, head by head and layer by layer: activations are freed while gradients appear, and at
the start of each one's backward there is what it needs for itself. The moment that needs most is the plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig

from .activations import FLOAT, Activations, saved_activations
from .counting import count_layer, count_parameters
from .setup import OPTIMIZERS, TrainingSetup

MIB = 2**20
CUDA_CONTEXT = 512 * MIB
"""CUDA's context and loaded kernels, outside of PyTorch's allocator. Ours, a round number for recent drivers."""
COLLECTIVES = 1024 * MIB
"""Buffers of NCCL on each GPU, outside of it too. Ours as well."""
WORKSPACE = 32 * MIB
"""cuBLAS' workspace on Hopper in PyTorch, where it is largest."""
BUCKET = 500_000_000
"""Numbers in one bucket of gradients, DeepSpeed's default `reduce_bucket_size`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU at the moment that needs most.

    Attributes:
        weights: Weights.
        gradients: Gradients that are there at that moment.
        optimizer: Master weights and moments.
        activations: What layers keep for backward.
        loss: Logits, log-probabilities and their gradients.
        temporary: What is computed on the way: a checkpointed layer's second forward, gradients of rows, casts.
        communication: Buckets and gathered weights.
        framework: CUDA's context and NCCL, which PyTorch's allocator does not see.
        moment: When that is.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    temporary: int
    communication: int
    framework: int
    moment: str

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.framework

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {name: value for name, value in vars(self).items() if name != "moment"}


@dataclass(frozen=True)
class _Moment:
    """Bytes that change in the course of a step."""

    name: str
    gradients: float
    activations: int
    loss: float
    temporary: float

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.loss + self.temporary


@dataclass
class _Now:
    """What is there at a point of the step; `gradient` is the bytes of a number, 0 if all gradients always are."""

    gradients: float
    activations: int
    loss: int
    gradient: int

    def grow(self, parameters: float) -> None:
        self.gradients += parameters * self.gradient

    def and_then(self, name: str, *, loss: float = 0, temporary: float = 0) -> _Moment:
        return _Moment(name, self.gradients, self.activations, self.loss + loss, temporary)


def plan_memory(config: CompassConfig, setup: TrainingSetup) -> MemoryPlan:
    """Memory of the GPU at its peak.

    Exact but for `temporary`, `communication` and `framework`, as long as the experts' load is even.

    Args:
        config: The model.
        setup: How it is trained.

    Raises:
        ValueError: The model cannot be trained so.
    """
    setup.check(config)
    size, frozen = setup.bytes_of, _frozen(config)
    share = {stage: _local_parameters(config, setup, sharded=setup.stage >= stage) for stage in (1, 2, 3)}
    kept = saved_activations(
        config,
        setup.batch,
        size,
        gradient_checkpointing=setup.gradient_checkpointing,
        expert_parallel_size=setup.expert_parallel_size,
    )
    peak = max(_moments(config, setup, kept, share[2] * size.gradients), key=lambda moment: moment.total)
    return MemoryPlan(
        weights=round(share[3] * size.weights + frozen * size.weights),
        gradients=round(peak.gradients),
        optimizer=round(share[1] * (size.master + 2 * setup.moment)),
        activations=peak.activations,
        loss=round(peak.loss),
        temporary=round(peak.temporary) + WORKSPACE,
        communication=round(_communication(config, setup)),
        framework=CUDA_CONTEXT + (COLLECTIVES if setup.world > 1 else 0),
        moment=peak.name,
    )


def routed_experts(config: CompassConfig) -> int:
    """Parameters of all routed experts that learn, those of MTP layers too."""
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    return count_layer(config).experts * (config.num_hidden_layers + ahead)


def dense_parameters(config: CompassConfig) -> int:
    """Parameters that learn and are no routed experts, which expert parallelism leaves on every GPU."""
    return count_parameters(config).trained - _frozen(config) - routed_experts(config)


def _frozen(config: CompassConfig) -> int:
    return 0 if config.effective_mtp_loss_coef else count_parameters(config).mtp


def _local_parameters(config: CompassConfig, setup: TrainingSetup, sharded: bool) -> float:
    dense, experts = dense_parameters(config), routed_experts(config) / setup.expert_parallel_size
    return dense / setup.world + experts / setup.expert_replicas if sharded else dense + experts


def _moments(
    config: CompassConfig, setup: TrainingSetup, kept: Activations, all_gradients: float
) -> Iterator[_Moment]:
    size, layer, counts = setup.bytes_of, count_layer(config), count_parameters(config)
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    table, logits = counts.embeddings, setup.batch.tokens * config.vocab_size
    local_experts = layer.experts / setup.expert_parallel_size
    local_layer = layer.total - layer.experts + local_experts
    joining = counts.mtp // config.num_mtp_layers - layer.total if ahead else 0
    copy = size.compute if size.copies else 0
    persistent = setup.gradient_accumulation_steps > 1 or setup.stage > 0
    loss = (1 + ahead) * kept.head + kept.head_copy
    now = _Now(all_gradients if persistent else 0, kept.total - loss, loss, 0 if persistent else size.gradients)

    # The last head's logits and their float32 copy, and the next token's logits, which are the model's output. The
    # layers' casts of their weights are in autocast's cache, though nothing else keeps them under checkpointing.
    whole = size.compute + (FLOAT if size.compute != FLOAT else 0)
    cached = dense_parameters(config) - counts.embeddings - counts.norms - counts.routers
    yield now.and_then(
        "end of forward",
        loss=logits * (whole + (size.compute if ahead else 0)),
        temporary=copy * cached if setup.gradient_checkpointing else 0,
    )

    def backward_of_head(name: str, learns: bool) -> _Moment:
        of_logits = 2 * logits * FLOAT  # gradients of log-probabilities and of logits
        of_weights = logits * size.compute + (table * (copy + size.gradients) if learns else 0)
        return now.and_then(name, loss=max(of_logits, of_weights))

    def backward_of_layer(name: str, again: int) -> _Moment:
        row = setup.batch.tokens * config.num_experts_per_tok * size.compute
        of_rows = row * max(3 * config.hidden_size, 2 * config.moe_intermediate_size)
        largest = local_experts * 2 / 3  # gate and up
        of_weights = largest * (copy + (size.gradients if persistent else 0))
        return now.and_then(name, temporary=again + of_rows + of_weights)

    twice = setup.gradient_checkpointing
    shared_has_gradient = False
    for depth in range(ahead, 0, -1):
        learns = not config.mtp_detach_head
        yield backward_of_head(f"backward of MTP head {depth}", learns)
        now.loss -= kept.head
        now.grow(table if learns and not shared_has_gradient else 0)
        shared_has_gradient = learns
        now.grow(local_layer + joining)
        yield backward_of_layer(f"backward of MTP layer {depth}", kept.mtp_layer.total if twice else 0)
        now.activations -= kept.kept_by_mtp_layer
    yield backward_of_head("backward of the head", True)
    now.loss = 0
    now.grow(0 if shared_has_gradient else table)
    for index in range(config.num_hidden_layers, 0, -1):
        now.grow(local_layer)
        yield backward_of_layer(f"backward of layer {index}", kept.layer.total if twice else 0)
        now.activations -= kept.kept_by_layer
    now.grow(0 if config.tie_word_embeddings else table)
    added = persistent or config.tie_word_embeddings  # to a gradient that is there, in place of becoming it
    yield now.and_then("backward of the embeddings", temporary=table * size.gradients if added else 0)

    now.activations = 0
    sharded = _local_parameters(config, setup, sharded=setup.stage >= 1)
    of_step = sharded * OPTIMIZERS[setup.optimizer].temporaries * setup.moment
    if size.master:
        of_step += sharded * FLOAT  # gradients of its part, for the master weights
    yield now.and_then("step of the optimizer", temporary=of_step)


def _communication(config: CompassConfig, setup: TrainingSetup) -> float:
    if setup.world == 1:
        return 0
    size, local = setup.bytes_of, _local_parameters(config, setup, sharded=False)
    if setup.stage == 0:
        return local * size.gradients
    gathered = 0.0
    if setup.stage == 3:
        layer = count_layer(config)
        gathered = 2 * (layer.total - layer.experts + layer.experts / setup.expert_parallel_size)
        gathered = min(gathered, local)
    return min(BUCKET, local) * size.gradients + gathered * size.weights
