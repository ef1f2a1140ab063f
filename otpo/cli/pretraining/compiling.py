"""The compiled layers of `otpo pretrain`: whether they pay, what forbids them, and what the header says."""

from typing import Any

from otpo.layouts.compiled import compile_layers, pays_back, why_not_compile


def compile_for_run(trainer: Any, asked: bool | None) -> str:
    """Compiles the layers of a trainer's model, at their first call, where that is asked for or pays.

    Args:
        trainer: A `PretrainingTrainer` that has not trained yet.
        asked: The option `compile_layers`. None compiles on a GPU in runs that are long enough.

    Returns:
        What the header says: what is compiled, or why nothing is.
    """
    if trainer.args.torch_compile:
        return "the whole model, as `torch_compile` says"
    if asked is False:
        return "no, as `compile_layers` says"
    if asked is None and not pays_back(trainer.accelerator.device, micro_batches(trainer)):
        return "no, unless `compile_layers` is set: the run is short, or on no GPU"
    reason = why_not_compile(trainer.model, trainer.accelerator.distributed_type, hidden_layer=-1)
    if reason is not None:
        return f"no, since {reason}"
    compile_layers(trainer.model)
    return "each layer, in the first steps, which takes a minute or two once and seconds from torch's cache"


def micro_batches(trainer: Any) -> int:
    """Micro-batches of a whole run, on each process."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps * args.gradient_accumulation_steps
    rows = len(trainer.train_dataset) * args.num_train_epochs  # a stream has to have `max_steps`
    return int(rows / (args.train_batch_size * trainer.accelerator.num_processes))
