"""DeepSpeed's configuration of a run with expert parallelism, and the check that its engine runs what was asked for.

Compass-v3 trains with its experts over the 8 GPUs of a node (arXiv 2509.09121); its authors do not say how. Here
groups of `ep_size` neighbouring processes share the experts, and all processes share the data.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from .deepspeed_patch import require_deepspeed
from .presets import PRESETS, require_preset
from .sizes import describe_expert_parallel

ZERO_STAGES = (1, 2, 3)
MODEL_TYPES = tuple(PRESETS)
"""`model_type` of the models whose experts DeepSpeed can spread."""


def expert_parallel_config(
    model_type: str, ep_size: int, zero_stage: int = 2, *, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run with expert parallelism, for `TrainingArguments(deepspeed=...)`.

    DeepSpeed knows the presets that the configuration names once `deepspeed_patch.patch_deepspeed()` was called. A
    trainer of [`deepspeed_trainer.with_expert_parallelism`] calls it; who makes an engine without one calls it first.

    Args:
        model_type: One of [`MODEL_TYPES`].
        ep_size: Processes that share the experts. 1 keeps all of them in each process, on the same path.
        zero_stage: 1 divides the optimizer's states, 2 gradients too, 3 weights too. DeepSpeed divides those of the
            experts among the processes that hold the same experts, and all others among all processes.
        base: A configuration of yours to start from; its own `zero_optimization.stage` wins.

    Raises:
        ValueError: An option is out of its range; the message says what to set.
        ImportError: DeepSpeed is not installed, or not in a version that the patch knows.
    """
    require_deepspeed()
    preset = require_preset(model_type)
    config: dict[str, Any] = deepcopy(dict(base or {}))
    config = {**dict.fromkeys(_FILLED_BY_THE_TRAINER, "auto"), "bf16": {"enabled": "auto"}, **config}
    zero = {"stage": zero_stage, **config.get("zero_optimization", {})}
    if zero["stage"] not in ZERO_STAGES:
        raise ValueError(
            f"ZeRO stage {zero['stage']} can't be trained and saved with expert parallelism. Set the stage to one of "
            f"{', '.join(map(str, ZERO_STAGES))}."
        )
    autoep = {"enabled": True, "autoep_size": ep_size, "preset_model": preset}
    count_without_waiting(config)
    return {**config, "zero_optimization": zero, "expert_parallel": autoep}


def count_without_waiting(config: dict[str, Any]) -> None:
    """Keeps DeepSpeed's count of samples a second from waiting for the device, unless a configuration asks for that.

    It does so before each micro-batch and after each step (`timers.throughput.synchronized`).

    Args:
        config: DeepSpeed's, which is changed.
    """
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("synchronized", False)


def require_expert_parallelism(engine: Any, ep_size: int) -> str:
    """Makes sure that a trainer's engine spreads the experts as was asked, and describes what runs.

    Args:
        engine: What the trainer trains, `trainer.model_wrapped`.
        ep_size: What was asked for.

    Raises:
        RuntimeError: Another engine runs, or experts were not spread, or not over `ep_size` processes of one machine.
    """
    import torch.distributed as dist
    from deepspeed import DeepSpeedEngine

    from .deepspeed_layer import parallel_experts

    # accelerate leaves DeepSpeed out without a word where the launcher or an option speaks against it.
    if not isinstance(engine, DeepSpeedEngine):
        raise RuntimeError(
            f"Expert parallelism of {ep_size} was asked for, but {type(engine).__name__} runs, not DeepSpeed's "
            "engine. Start the processes by `accelerate launch`, and leave `use_cpu` out."
        )

    # DeepSpeed replaces the blocks that its parser finds, so a model of another structure keeps its experts whole.
    model: Any = engine.module
    layers = [layer for _, layer in parallel_experts(model)]
    sizes = {layer.ep_size for layer in layers}
    if sizes != {ep_size}:
        raise RuntimeError(
            f"Expert parallelism of {ep_size} was asked for, but the model has {len(layers)} expert-parallel layers, "
            f"of sizes {sorted(sizes)}."
        )

    # DeepSpeed chooses the processes of a group, and an all-to-all between machines would be slow.
    ranks = dist.get_process_group_ranks(layers[0].ep_group)
    node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if len(ranks) != ep_size or len({rank // node for rank in ranks}) != 1:
        raise RuntimeError(f"The processes {ranks} that share experts are not {ep_size} of one machine.")
    zero = f"DeepSpeed ZeRO-{engine.zero_optimization_stage()}"
    return describe_expert_parallel(ep_size, layers[0].num_local_experts, len(layers), zero)


_FILLED_BY_THE_TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
