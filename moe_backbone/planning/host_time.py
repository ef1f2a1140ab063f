"""What layers that are not compiled, and DeepSpeed, add to a step: traffic of the memory, and launches by the host.

All numbers count what the code does: operations that PyTorch dispatches in a step on the CPU, and the bytes of the
tensors that they read and write. Tests count those of layers again.
Legend: T tokens of a micro-batch, H hidden size, K experts that a token takes, I width of an expert, E experts.
"""

from moe_backbone.model.configuration_compass import CompassConfig

from .counting import count_layer
from .memory import dense_parameters, routed_experts
from .setup import TrainingSetup

# Bytes for each of T * (H, numbers of all queries, numbers of all keys, K * H, K * I, E), forward and backward. With
# grouped_mm K * H has moves of rows, which are counted elsewhere where memcpy does them.
_BYTES = {
    (True, "grouped_mm"): ((105, 84, 91, 13.5, 10, 78), (289, 179, 187, 34, 26, 69)),
    (True, "memcpy"): ((101, 84, 91, 1.5, 10, 78), (289, 178, 185, 1.5, 26, 101)),
    (False, "grouped_mm"): ((95, 56, 60, 13, 10, 55), (229, 129, 135, 33, 26, 53)),
    (False, "memcpy"): ((91, 56, 60, 1, 10, 55), (229, 129, 132, 1, 26, 85)),
}
# Launches of a layer, forward and backward.
_LAUNCHES = {
    (True, "grouped_mm"): (100, 151),
    (True, "memcpy"): (91, 143),
    (False, "grouped_mm"): (90, 140),
    (False, "memcpy"): (81, 132),
}
_COMPILED = (30, 50)  # products, attention, moves of rows and what is fused between them: our estimate
_OUTSIDE = 100  # embeddings, heads, losses, the optimizer
_CAST = 6  # autocast reads 4 bytes of a weight and writes 2; its backward the other way round
# A checkpointed layer keeps tensors by calls of Python, as long as so many launches: 1.6 for each of 95 tensors.
_HOOKS = 152
# DeepSpeed's bytes for a gradient on its way into buckets, and for a number of this GPU's part in its step: norms in
# double precision 10, casts 12, unscaling 8, joining 4, checks 4, and what the norm reads 8.
_BUCKETS, _PART = 16, 46
# DeepSpeed's work for a parameter in hooks and in its step, as long as so many launches: 11 to 24 by the clock of a
# CPU. It waits for the device there, so nothing hides this work.
_PARAMETER = 14


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
        slots * config.moe_intermediate_size + config.num_shared_experts * config.moe_intermediate_size,
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


def host_time(config: CompassConfig, setup: TrainingSetup, launch: float) -> tuple[float, float]:
    """Seconds of the host in a step: those that overlap the device's work, and those that do not.

    Args:
        config: The model.
        setup: The options of the run.
        launch: Seconds for one launched operation.
    """
    forward, backward = _COMPILED if setup.compiles(config) else _LAUNCHES[_kind(setup)]
    twice = (forward + _HOOKS) if setup.gradient_checkpointing else 0
    launches = _layers(config) * (forward + backward + twice) + _OUTSIDE
    beside = launches * setup.gradient_accumulation_steps * launch
    names = 11 + (3 if config.num_shared_experts else 0)
    serial = (names * _layers(config) * _PARAMETER + _OUTSIDE) * launch if setup.stage else 0.0
    if setup.expert_parallel_size > 1 and not setup.gathers(config):
        # Each layer's rows wait for their number, so that its launches overlap nothing.
        serial, beside = serial + beside, 0.0
    return beside, serial


def _layers(config: CompassConfig) -> int:
    return config.num_hidden_layers + (config.num_mtp_layers if config.effective_mtp_loss_coef else 0)
