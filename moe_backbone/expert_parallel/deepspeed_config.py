"""Expert parallelism inside the node: DeepSpeed's configuration for it, and what is checked before a run and in it.

Compass-v3 trains with its experts over the 8 GPUs of a node (arXiv 2509.09121); how is not published. Here groups of
`ep_size` neighbouring processes share the experts, and all processes share the data. DeepSpeed is imported when a
configuration is made, not before.
"""

import importlib.util
import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

ZERO_STAGES = (1, 2, 3)
MODEL_TYPES = ("compass", "mixtral", "qwen3_moe")
"""`model_type` of the models whose experts can be spread; `deepspeed_patch` has a preset for each."""


def expert_parallel_config(
    model_type: str, ep_size: int, zero_stage: int = 2, *, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run with expert parallelism, for `TrainingArguments(deepspeed=...)`.

    Args:
        model_type: One of [`MODEL_TYPES`].
        ep_size: Processes that share the experts. 1 keeps all of them in each process, on the same path.
        zero_stage: 1 divides the optimizer's states, 2 gradients too, 3 weights too: those of experts among the
            processes that hold the same experts, all others among all processes.
        base: A configuration of yours to start from; its own `zero_optimization.stage` wins.

    Raises:
        ValueError: An option is out of its range; the message says what to set.
        ImportError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("Expert parallelism needs DeepSpeed: `pip install 'otpo[deepspeed]'`.")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"The experts of a model of type '{model_type}' can't be spread by DeepSpeed here, those of "
            f"{', '.join(MODEL_TYPES)} can. Leave `expert_parallel_size` at 1."
        )
    config: dict[str, Any] = deepcopy(dict(base or {}))
    config = {**dict.fromkeys(_FILLED_BY_THE_TRAINER, "auto"), "bf16": {"enabled": "auto"}, **config}
    zero = {"stage": zero_stage, **config.get("zero_optimization", {})}
    if zero["stage"] not in ZERO_STAGES:
        raise ValueError(
            f"ZeRO stage {zero['stage']} can't be trained and saved with expert parallelism. Set the stage to one of "
            f"{', '.join(map(str, ZERO_STAGES))}."
        )
    from .deepspeed_patch import PRESETS, register_presets

    register_presets()
    autoep = {"enabled": True, "autoep_size": ep_size, "preset_model": PRESETS[model_type]}
    return {**config, "zero_optimization": zero, "expert_parallel": autoep}


def check_expert_parallel(ep_size: int, num_experts: int, world_size: int, gpus_per_node: int | None = None) -> None:
    """Raises a `ValueError` where experts cannot be spread so.

    Args:
        ep_size: Processes that share the experts.
        num_experts: Experts of each layer.
        world_size: Processes of the run.
        gpus_per_node: Processes on a machine; None for what the launcher says (`LOCAL_WORLD_SIZE`).
    """
    node = gpus_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    fitting = [n for n in range(1, min(node, num_experts) + 1) if node % n == num_experts % n == 0]
    remedy = f"Set `expert_parallel_size` to one of {fitting}."
    if ep_size < 1:
        raise ValueError(f"`expert_parallel_size` must be at least 1, got {ep_size}. {remedy}")
    if num_experts % ep_size:
        raise ValueError(f"`expert_parallel_size={ep_size}` does not divide the {num_experts} experts. {remedy}")
    if node % ep_size:
        raise ValueError(
            f"`expert_parallel_size={ep_size}` does not divide the {node} process(es) of a machine. Experts are "
            f"shared inside a machine, whose links are fast; across machines the data alone is. {remedy}"
        )


def require_expert_parallelism(engine: Any, ep_size: int) -> str:
    """Describes what really runs, after making sure that it is what was asked for.

    Args:
        engine: What the trainer trains, `trainer.model_wrapped`.
        ep_size: What was asked for.

    Raises:
        RuntimeError: Another engine runs, or experts were not spread, or not over `ep_size` processes of one machine.
    """
    from deepspeed import DeepSpeedEngine

    from .deepspeed_layer import parallel_experts

    if not isinstance(engine, DeepSpeedEngine):
        raise RuntimeError(
            f"Expert parallelism of {ep_size} was asked for, but {type(engine).__name__} runs, not DeepSpeed's "
            "engine. Start the processes by `accelerate launch`, and leave `use_cpu` out."
        )
    model: Any = engine.module
    layers = [layer for _, layer in parallel_experts(model)]
    sizes = {layer.ep_size for layer in layers}
    if sizes != {ep_size}:
        raise RuntimeError(
            f"Expert parallelism of {ep_size} was asked for, but the model has {len(layers)} expert-parallel layers, "
            f"of sizes {sorted(sizes)}."
        )
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(layers[0].ep_group)
    node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if len(ranks) != ep_size or len({rank // node for rank in ranks}) != 1:
        raise RuntimeError(f"The processes {ranks} that share experts are not {ep_size} of one machine.")
    local = layers[0].num_local_experts
    return (
        f"{local} of {layers[0].num_experts} in each process, over {ep_size} process(es), in {len(layers)} layers; "
        f"DeepSpeed ZeRO-{engine.zero_optimization_stage()}"
    )


_FILLED_BY_THE_TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
