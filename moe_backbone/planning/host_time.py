"""What layers that are not compiled, and DeepSpeed, add to a step: traffic of the memory, and launches by the host.

Launches and bytes count what the code does: operations that PyTorch dispatches in a step on the CPU, and the bytes of
the tensors that they read and write; tests count those of layers again. How long the host takes was measured, and is
written as so many launches by Python, so that one number stands for a slower host.
Legend: T tokens of a micro-batch, H hidden size, K experts that a token takes, I width of an expert, E experts.
"""

from dataclasses import dataclass

from moe_backbone.model.configuration_compass import CompassConfig

from .counting import count_layer
from .memory import dense_parameters, routed_experts
from .setup import TrainingSetup

# Bytes for each of T * (H, numbers of all queries, numbers of all keys, K * H, K * I, width of the shared experts, E),
# forward and backward. With grouped_mm K * H has moves of rows, which are counted elsewhere where memcpy does them.
# memcpy's SwiGLU is one pass each way.
_BYTES = {
    (True, "grouped_mm"): ((105, 84, 91, 13.5, 10, 10, 58), (289, 179, 187, 34, 26, 26, 63)),
    (True, "memcpy"): ((101, 84, 91, 1.5, 6, 10, 58), (289, 178, 185, 1.5, 10, 26, 95)),
    (False, "grouped_mm"): ((95, 56, 60, 13, 10, 10, 47), (229, 129, 135, 33, 26, 26, 53)),
    (False, "memcpy"): ((91, 56, 60, 1, 6, 10, 47), (229, 129, 132, 1, 10, 26, 85)),
}
# Launches of a layer, forward and backward.
_LAUNCHES = {
    (True, "grouped_mm"): (79, 138),
    (True, "memcpy"): (70, 130),
    (False, "grouped_mm"): (73, 128),
    (False, "memcpy"): (64, 120),
}
_COMPILED = (30, 50)  # products, attention, moves of rows and what is fused between them: our estimate
_OUTSIDE = 50  # in each pass: embeddings, heads, losses; our estimate
_CAST = 6  # autocast reads 4 bytes of a weight and writes 2; its backward the other way round
# Autograd launches the backward from C++, in this share of the time that Python takes for an operation of the forward.
# Two steps of compass-small with one row tell both, on an H200 with transformers 5.23, 28 November 2026. One took 89
# ms without the optimizer: 52 of the host for the forward, then 37 of the device, slower than the host from there.
# With checkpointing it took 126 ms, all of them the host's: two forwards, and 22 for the backward. What a checkpoint
# does beside its second forward does not show. In these steps the routers' losses were computed layer by layer.
_FROM_CPP = 0.29
# DeepSpeed's bytes for a gradient on its way into buckets, and for a number of this GPU's part in its step: norms in
# double precision 10, casts 12, unscaling 8, joining 4, checks 4, and what the norm reads 8.
_BUCKETS, _PART = 16, 46
# DeepSpeed's work for a parameter in hooks, as long as so many launches, by the clock of a CPU. It is in the backward,
# and the device works beside it.
_HOOK = 12
# DeepSpeed's step waits for the gradients' norm, so that nothing hides what it does for a parameter and once, as long
# as so many launches: two H200 idled for 12 to 17 ms in steps of 12 layers, for 5 to 7 in those of one, transformers
# 5.23, DeepSpeed 0.19.8, 28 November 2026, by idle shares of steps under a profiler, which slows the host. Pretraining
# in bfloat16 has no such wait since (`expert_parallel/deepspeed_norms`), and DeepSpeed's clock waits no longer. No
# step on GPUs was measured so, and plans may lie above what one takes.
_STEP, _STEP_ONCE = 2, 140
# The host waits for the number of rows that are sent, and the device then for the host, in each layer's forward, as
# long as so many launches: two H200 idled for 10 to 15 ms more than where no layer waits, in 12 layers, that day.
_ROWS_WAIT = 25


@dataclass(frozen=True)
class HostTime:
    """Seconds of the host.

    Attributes:
        forward: To launch the forward of a micro-batch.
        backward: To launch its backward, a checkpointed layer's second forward and DeepSpeed's hooks included.
        alone: What no work of the device hides, in a whole step.
        runs_ahead: Whether the host may launch the next pass before the device has done this one.
    """

    forward: float
    backward: float
    alone: float
    runs_ahead: bool

    def waiting(self, layers: float, heads: float, backward: float, micro_batches: int) -> float:
        """Seconds of a step in which the device waits for the host.

        The device ends a pass when it has done its own work, and not before the host has launched all of it.

        Args:
            layers: Seconds of the device in the forward of a micro-batch's layers.
            heads: Seconds in its heads and losses, both passes, which few launches start.
            backward: Seconds in the layers' backward.
            micro_batches: Micro-batches of a step.
        """
        launched = done = 0.0
        for _ in range(micro_batches):
            for host, device in ((self.forward, layers), (0.0, heads), (self.backward, backward)):
                launched += host
                done = max(done + device, launched)
                if not self.runs_ahead:
                    launched = done
        return done - micro_batches * (layers + heads + backward) + self.alone


def _kind(setup: TrainingSetup) -> tuple[bool, str]:
    return setup.bytes_of.copies, setup.experts_implementation


def eager_bytes(config: CompassConfig, setup: TrainingSetup) -> float:
    """Bytes that layers that are not compiled move in one micro-batch, products and attention not counted."""
    slots = config.num_experts_per_tok * (setup.expert_parallel_size if setup.gathers(config) else 1)
    widths = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        slots * config.hidden_size,
        slots * config.moe_intermediate_size,
        config.num_shared_experts * config.moe_intermediate_size,
        config.num_experts,
    )
    layer = count_layer(config)
    casts = layer.attention + layer.experts // setup.expert_parallel_size + layer.shared_experts
    passes = [
        setup.batch.tokens * sum(a * b for a, b in zip(widths, each, strict=True))
        + (_CAST * casts if setup.bytes_of.copies else 0)
        for each in _BYTES[_kind(setup)]
    ]
    return _layers(config) * ((2 if setup.gradient_checkpointing else 1) * passes[0] + passes[1])


def engine_bytes(config: CompassConfig, setup: TrainingSetup) -> float:
    """Bytes that DeepSpeed moves in a step beside the optimizer's; 0 without it."""
    if not setup.stage:
        return 0.0
    experts = routed_experts(config) / setup.expert_parallel_size
    whole = dense_parameters(config) + experts
    part = dense_parameters(config) / setup.world + experts / setup.expert_replicas
    return whole * _BUCKETS * setup.gradient_accumulation_steps + part * _PART


def layer_launches(config: CompassConfig, setup: TrainingSetup) -> tuple[int, int]:
    """Operations that all layers launch in a micro-batch, forward and backward, no forward twice."""
    forward, backward = _COMPILED if setup.compiles(config) else _LAUNCHES[_kind(setup)]
    return _layers(config) * forward, _layers(config) * backward


def host_time(config: CompassConfig, setup: TrainingSetup, launch: float) -> HostTime:
    """What the host does in a step.

    Args:
        config: The model.
        setup: The options of the run.
        launch: Seconds for one operation that Python launches.
    """
    forward, backward = layer_launches(config, setup)
    passes = 2 if setup.gradient_checkpointing else 1
    later = _FROM_CPP * (backward + _OUTSIDE) + (passes - 1) * forward
    alone = 0
    if setup.stage:
        parameters = (11 + (3 if config.num_shared_experts else 0)) * _layers(config)
        later += parameters * _HOOK
        alone += parameters * _STEP + _STEP_ONCE
    sends = setup.expert_parallel_size > 1 and not setup.gathers(config)
    if sends:
        alone += _layers(config) * passes * setup.gradient_accumulation_steps * _ROWS_WAIT
    return HostTime((forward + _OUTSIDE) * launch, later * launch, alone * launch, runs_ahead=not sends)


def _layers(config: CompassConfig) -> int:
    return config.num_hidden_layers + (config.num_mtp_layers if config.effective_mtp_loss_coef else 0)
