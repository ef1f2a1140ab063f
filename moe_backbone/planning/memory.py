"""Memory of one GPU in a training step, at the moment when the step needs most of it.

Weights and optimizer states take the same memory all the time. Activations, gradients and temporary tensors come and
go, so `_moments` walks through the step: the end of the forward, the backward of each head and layer from the last one
to the first, and the optimizer's step. Each layer's backward frees its activations and adds its gradients, and while
it runs it needs temporary tensors. `plan_memory` takes the moment with the largest sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig

from .activations import FLOAT, MASTERS, Activations, saved_activations
from .counting import count_layer, count_parameters
from .setup import OPTIMIZERS, TrainingSetup

MIB = 2**20
CUDA_CONTEXT = 512 * MIB
"""Bytes of CUDA's context and loaded kernels, which PyTorch's allocator does not count. Our round number for recent
drivers."""
COLLECTIVES = 1024 * MIB
"""Bytes of NCCL's buffers on each GPU, which the allocator does not count either. Our round number too."""
WORKSPACE = 32 * MIB
"""Bytes of cuBLAS' workspace in PyTorch, taken for Hopper, where it is largest."""
BUCKET = 500_000_000
"""Gradients (numbers, not bytes) in one bucket: DeepSpeed's default `reduce_bucket_size`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU at the moment of the step that needs most.

    Attributes:
        weights: The model's weights.
        gradients: Gradients that exist at this moment.
        optimizer: The optimizer's master weights and moments.
        activations: Tensors that layers keep for their backward.
        loss: Logits, log-probabilities and their gradients.
        temporary: Tensors that one operation makes and frees: a checkpointed layer's second forward, gradients of the
            experts' rows, casts, the workspace of matrix products.
        communication: Buckets of gradients, and weights that ZeRO-3 gathers.
        framework: CUDA's context and NCCL's buffers, which PyTorch's allocator does not count.
        moment: Name of the moment, such as `"backward of layer 12"`.
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
        """Bytes that `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.framework

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part, by the attribute's name."""
        return {name: value for name, value in vars(self).items() if name != "moment"}


@dataclass(frozen=True)
class _Moment:
    """Bytes at one moment of the step, of the parts that change during it."""

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
    """Bytes that exist at the point of the step where the walk stands; the walk changes them as it goes.

    Attributes:
        gradients: Gradients so far.
        activations: Activations that are not freed yet.
        loss: Tensors that the heads keep and have not freed yet.
        gradient: Bytes that the gradient of one more parameter takes; 0 where all gradients exist from the start.
    """

    gradients: float
    activations: int
    loss: int
    gradient: int

    def add_gradients(self, parameters: float) -> None:
        """Adds the gradients of so many parameters."""
        self.gradients += parameters * self.gradient

    def moment(self, name: str, *, loss: float = 0, temporary: float = 0) -> _Moment:
        """The moment that adds these short-lived bytes to what exists."""
        return _Moment(name, self.gradients, self.activations, self.loss + loss, temporary)


def plan_memory(config: CompassConfig, setup: TrainingSetup) -> MemoryPlan:
    """Bytes on one GPU at the peak of a training step.

    With an even load of the experts all parts are exact but `temporary`, `communication` and `framework`, which are
    estimates.

    Args:
        config: The model.
        setup: The options of the run.

    Raises:
        ValueError: This setup cannot train the model; the message names the option and what to set.
    """
    setup.check(config)
    size, frozen = setup.bytes_of, _frozen(config)
    # ZeRO shards optimizer states from stage 1 on, gradients from 2 on and weights at 3.
    local = {stage: _local_parameters(config, setup, sharded=setup.stage >= stage) for stage in (1, 2, 3)}
    kept = saved_activations(
        config,
        setup.batch,
        size,
        gradient_checkpointing=setup.gradient_checkpointing,
        expert_parallel_size=setup.expert_parallel_size,
        gathers=setup.gathers(config),
    )
    peak = max(_moments(config, setup, kept, local[2] * size.gradients), key=lambda moment: moment.total)
    return MemoryPlan(
        weights=round(local[3] * size.weights + frozen * size.weights),
        gradients=round(peak.gradients),
        optimizer=round(local[1] * (size.master + 2 * setup.moment)),
        activations=peak.activations,
        loss=round(peak.loss),
        temporary=round(peak.temporary) + WORKSPACE,
        communication=round(_communication(config, setup)),
        framework=CUDA_CONTEXT + (COLLECTIVES if setup.world > 1 else 0),
        moment=peak.name,
    )


def routed_experts(config: CompassConfig) -> int:
    """Parameters of all routed experts that learn, in decoder layers and MTP layers."""
    ahead = config.num_mtp_layers if config.effective_mtp_loss_coef else 0
    return count_layer(config).experts * (config.num_hidden_layers + ahead)


def dense_parameters(config: CompassConfig) -> int:
    """Parameters that learn outside of the routed experts. Expert parallelism keeps them on every GPU."""
    return count_parameters(config).trained - _frozen(config) - routed_experts(config)


def _frozen(config: CompassConfig) -> int:
    """Parameters that do not learn: the MTP layers' where the weight of their loss is 0."""
    return 0 if config.effective_mtp_loss_coef else count_parameters(config).mtp


def _local_parameters(config: CompassConfig, setup: TrainingSetup, sharded: bool) -> float:
    """Learning parameters of one GPU; with `sharded` divided among all GPUs that hold the same ones."""
    dense, experts = dense_parameters(config), routed_experts(config) / setup.expert_parallel_size
    return dense / setup.world + experts / setup.expert_replicas if sharded else dense + experts


def _moments(
    config: CompassConfig, setup: TrainingSetup, kept: Activations, all_gradients: float
) -> Iterator[_Moment]:
    """The moments of a step in the order of time.

    Args:
        config: The model.
        setup: The options of the run.
        kept: Bytes that the forward keeps for the backward.
        all_gradients: Bytes of all gradients on this GPU.
    """
    # Sizes that several moments need. Gradients persist through the step where micro-batches or ZeRO's buckets add to
    # them; otherwise each one appears in the backward of its layer.
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

    # At the end of the forward, the last head's logits and their float32 copy exist. With MTP layers the next token's
    # logits exist beside them, since the model returns them. Autocast's cache holds the layers' cast weights; under
    # checkpointing nothing else does, so they are not among the activations.
    whole = size.compute + (FLOAT if size.compute != FLOAT else 0)
    cached = dense_parameters(config) - counts.embeddings - counts.norms - counts.routers
    yield now.moment(
        "end of forward",
        loss=logits * (whole + (size.compute if ahead else 0)),
        temporary=copy * cached if setup.gradient_checkpointing else 0,
    )

    def backward_of_head(name: str, learns: bool) -> _Moment:
        # First the gradients of log-probabilities and logits exist, then those of cast logits and the head's weights.
        of_logits = 2 * logits * FLOAT
        of_weights = logits * size.compute + (table * (copy + size.gradients) if learns else 0)
        return now.moment(name, loss=max(of_logits, of_weights))

    def backward_of_layer(name: str, again: int) -> _Moment:
        # The experts' backward needs most: gradients of all rows, and of the largest weight, gate and up together.
        reserved = setup.expert_parallel_size if setup.gathers(config) else 1
        row = setup.batch.tokens * config.num_experts_per_tok * size.compute * reserved
        of_rows = row * max(3 * config.hidden_size, 2 * config.moe_intermediate_size)
        largest = local_experts * 2 / 3
        of_weights = largest * (copy + (size.gradients if persistent else 0))
        return now.moment(name, temporary=again + of_rows + of_weights)

    # The backward of the MTP heads and layers, the last one first. All heads share one weight, so the first backward
    # that reaches it makes its gradient, and the others add to it.
    twice = setup.gradient_checkpointing
    shared_has_gradient = False
    for depth in range(ahead, 0, -1):
        learns = not config.mtp_detach_head
        yield backward_of_head(f"backward of MTP head {depth}", learns)
        now.loss -= kept.head
        now.add_gradients(table if learns and not shared_has_gradient else 0)
        shared_has_gradient = learns
        now.add_gradients(local_layer + joining)
        yield backward_of_layer(f"backward of MTP layer {depth}", kept.mtp_layer.total if twice else 0)
        now.activations -= kept.kept_by_mtp_layer

    # The backward of the next token's head and of the decoder layers, the last one first.
    yield backward_of_head("backward of the head", True)
    now.loss = 0
    now.add_gradients(0 if shared_has_gradient else table)
    for index in range(config.num_hidden_layers, 0, -1):
        now.add_gradients(local_layer)
        yield backward_of_layer(f"backward of layer {index}", kept.layer.total if twice else 0)
        now.activations -= kept.kept_by_layer

    # The backward of the embeddings. Where the table has a gradient already, its second part needs memory of its own
    # before it is added.
    now.add_gradients(0 if config.tie_word_embeddings else table)
    added = persistent or config.tie_word_embeddings
    yield now.moment("backward of the embeddings", temporary=table * size.gradients if added else 0)

    # The optimizer's step, on this GPU's part of the parameters. Whole master weights need float32 copies of the
    # gradients; those in two halves are updated within a kernel.
    now.activations = 0
    sharded = _local_parameters(config, setup, sharded=setup.stage >= 1)
    copies = 0 if setup.precision == MASTERS else OPTIMIZERS[setup.optimizer].temporaries
    of_step = sharded * copies * setup.moment
    if size.master == FLOAT:
        of_step += sharded * FLOAT
    yield now.moment("step of the optimizer", temporary=of_step)


def _communication(config: CompassConfig, setup: TrainingSetup) -> float:
    """Bytes of buffers for collectives: buckets of gradients, and at ZeRO-3 two gathered layers of weights."""
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
