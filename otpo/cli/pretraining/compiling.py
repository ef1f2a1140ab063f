"""Compiled layers of `otpo pretrain` and `otpo sft`: whether they are asked for, what forbids them, what is said."""

from typing import Any

from accelerate import DistributedType

from otpo.layouts.compiled import compile_layers, why_not_compile


def compile_for_run(trainer: Any, *, asked: bool | None) -> str:
    """Compiles the layers of a trainer's model, at their first call, where that is asked for or the default.

    Args:
        trainer: A trainer that has not trained yet. Its batches may vary, but for those of pretraining.
        asked: The option `compile_layers`; None compiles on a GPU.

    Returns:
        What the header says: what is compiled, or why nothing is.
    """
    if trainer.args.torch_compile:
        return "the whole model, as `torch_compile` says"
    if asked is False:
        return "no (`compile_layers`)"
    if asked is None and trainer.args.device.type != "cuda":
        return "no, since there is no GPU (`compile_layers`)"
    reason = why_not_compile(trainer.model, _engine(trainer))
    if reason is None and getattr(trainer, "gathers", None) is False:
        reason = "rows are sent to spread experts by numbers that a graph would wait for"
        reason += " (`expert_exchange`)" if hasattr(trainer, "tokens_in_batch") else ""
    if reason is None and getattr(trainer, "gathers", False) and trainer.batches_vary:
        reason = "spread experts gather another number of tokens in each batch, and each would ask for another graph"
    if reason is not None:
        return f"no, since {reason}"
    compile_layers(trainer.model, dynamic=None)  # for one size, until another one comes
    return "each layer, in the first steps, which takes a minute once and seconds from torch's cache"


def _engine(trainer: Any) -> DistributedType:
    """The engine as far as layers see it: below stage 3, DeepSpeed leaves their parameters where they are."""
    engine = trainer.accelerator.distributed_type
    if engine == DistributedType.DEEPSPEED and trainer.accelerator.state.deepspeed_plugin.zero_stage < 3:
        return DistributedType.MULTI_GPU
    return engine
