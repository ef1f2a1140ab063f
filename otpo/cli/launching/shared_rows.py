"""Rows whose tokens several processes share, as accelerate's `ParallelismConfig` has them: what trains so, and how.

accelerate has two ways: context parallelism (`cp_size`) by torch's ring attention beside FSDP2, and sequence
parallelism (`sp_size`) by DeepSpeed's Ulysses. Both cut a batch along its tokens, and attention alone sees whole rows.
"""

from collections.abc import Mapping
from typing import Any

from .engine import is_on

_REFUSED = {
    "align": "the preference loss and its token weights are of whole responses, and TRL's DPO trainer has no sum over "
    "the processes that share one. Set it to 1; for long pairs use zero3 or fsdp2, `gradient_checkpointing`, "
    "`row_layout` and `max_length`",
    "pretrain": "a row holds several documents, which attention would no longer keep apart. Set it to 1",
}
_ENGINES = {"cp": ("FSDP", "fsdp2"), "sp": ("DEEPSPEED", "zero3")}
_SEVERAL_DOCUMENTS = ("packing", "eval_packing", "padding_free")
_WHOLE_STAGE = 3


def require_sharing_that_is_read(args: Any, config: Any) -> None:
    """Raises a `ValueError` when the launcher would leave out that rows are to be shared, or stop with another reason.

    accelerate reads the sizes where its configuration has a block `parallelism_config`, or beside `--use_fsdp`.

    Args:
        args: Of accelerate's launcher, not yet filled in from a configuration.
        config: The configuration that was named; None if none was.
    """
    sizes = {name: getattr(args, f"parallelism_config_{name}_size") for name in _ENGINES}
    asked = [name for name, size in sizes.items() if size > 1]
    if config is not None and not (args.use_fsdp or args.use_deepspeed or args.multi_gpu):
        read = bool(getattr(config, "parallelism_config", None)) and not args.use_parallelism_config
    else:
        read = args.use_parallelism_config and args.use_fsdp
    if read or not (asked or args.use_parallelism_config):
        return
    if not asked:
        raise ValueError(
            "`--use_parallelism_config`: accelerate reads sizes where its configuration has a block "
            "`parallelism_config`. Name a file by `--accelerate_config` that has one with the sizes that you want, "
            "or leave the option out."
        )
    name = asked[0]
    option = f"parallelism_config_{name}_size"
    given = f"--{option} {sizes[name]}"
    raise ValueError(
        f"`{given}`: accelerate reads the size where its configuration has it. Name a file by `--accelerate_config` "
        f"with what {_ENGINES[name][1]} has and `parallelism_config: {{{option}: {max(2, sizes[name])}}}`."
    )


def require_whole_rows(
    command: str, engines: Mapping[str, str], environ: Mapping[str, str], values: Mapping[str, Any]
) -> None:
    """Raises a `ValueError` when accelerate would share the tokens of a row among processes and the command can't.

    `DPOTrainer` sums a response's log-probabilities within a process and takes the sigmoid of the sums, and OTPO's
    transport takes the states of all tokens of both responses. Both ways drop attention masks, which keep the
    documents of a row apart.

    Args:
        command: Of `otpo`.
        engines: Engines and what asked for them, of [`otpo.cli.launching.engine.requested_engines`].
        environ: The environment that `accelerate launch` prepared.
        values: Value of each option of the command.
    """
    if not is_on(environ.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        return
    for name, (engine, config) in _ENGINES.items():
        size = int(environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE") or 1)
        option = f"`parallelism_config_{name}_size={size}`"
        if size == 1:
            continue
        if command in _REFUSED:
            raise ValueError(f"{option} with `otpo {command}`: {_REFUSED[command]}.")
        if engine not in engines:
            raise ValueError(
                f"{option} works beside {engine} alone. Set `--accelerate_config {config}`, or the size to 1."
            )
        if values.get("expert_parallel_size", 1) != 1:
            raise ValueError(
                f"{option} with `expert_parallel_size={values['expert_parallel_size']}`: processes that share rows "
                "can't share experts too. Set one of them to 1."
            )
        _require_rows_that_can_be_cut(option, size, values)
        _require_attention(name, option, environ, values)


def _require_rows_that_can_be_cut(option: str, size: int, values: Mapping[str, Any]) -> None:
    for name in _SEVERAL_DOCUMENTS:
        if values.get(name):
            raise ValueError(
                f"`{name}={values[name]}` with {option}: attention takes no mask there, so documents of a row would "
                f"see each other. Leave `{name}` out, or set the size to 1."
            )
    multiple = values.get("pad_to_multiple_of")  # text, where a command line that is still to be checked has it
    if not str(multiple).isdecimal() or int(str(multiple)) % size or not int(str(multiple)):
        raise ValueError(
            f"`pad_to_multiple_of={multiple}` with {option}: rows are cut in equal parts. Set `pad_to_multiple_of` to "
            f"{2 * size}, so that processes have equal work, or to another multiple of {size}."
        )


def _require_attention(name: str, option: str, environ: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Torch's ring takes the place of sdpa; Ulysses that of the function that its own option names."""
    attention = values.get("attn_implementation") or "sdpa"
    if name == "cp" and attention != "sdpa":
        raise ValueError(
            f"`attn_implementation={attention}` with {option}: torch's ring attention takes the place of sdpa alone. "
            "Set `attn_implementation` to sdpa, or the size to 1."
        )
    inside = environ.get("PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION")
    if name == "sp" and inside != attention:
        raise ValueError(
            f"`parallelism_config_sp_attn_implementation={inside}` with {option}: the model's attention is "
            f"{attention}. Set `--parallelism_config_sp_attn_implementation {attention}`."
        )


def require_right_gradients(accelerator: Any) -> None:
    """Raises a `ValueError` where DeepSpeed would make the gradients of shared rows too large.

    transformers 5.23 gathers the losses of a row's processes by an operator whose gradient is a sum over these. So the
    engine must average over all processes, as ZeRO-3's reduce-scatter of DeepSpeed 0.19 does. Its other reductions sum
    over those that share a row: each gradient, and the norm that `max_grad_norm` cuts, would be `sp_size` times that
    of one process.

    Args:
        accelerator: Of a trainer, with its configuration read.
    """
    if processes_of_a_row(accelerator) == 1 or accelerator.parallelism_config.sp_size == 1:
        return
    plugin = accelerator.state.deepspeed_plugin
    scatters = plugin.deepspeed_config["zero_optimization"].get("reduce_scatter", True)
    if plugin.zero_stage != _WHOLE_STAGE or not scatters:
        size = accelerator.parallelism_config.sp_size
        raise ValueError(
            f"`parallelism_config_sp_size={size}` with ZeRO-{plugin.zero_stage} and `reduce_scatter: "
            f"{str(scatters).lower()}`: each gradient would be {size} times that of one process. Set "
            "`--accelerate_config zero3`, and leave `reduce_scatter` out."
        )


def processes_of_a_row(accelerator: Any) -> int:
    """How many processes share the tokens of each row; 1 where each process has rows of its own."""
    parallelism = accelerator.parallelism_config
    return 1 if parallelism is None else parallelism.cp_size * parallelism.sp_size


def rows_in_step(trainer: Any) -> int:
    """Rows of a step of the optimizer, over micro-batches and processes."""
    args = trainer.args
    groups = trainer.accelerator.num_processes // processes_of_a_row(trainer.accelerator)
    return args.train_batch_size * args.gradient_accumulation_steps * groups


def require_a_batch(trainer: Any) -> None:
    """Raises a `ValueError` where `dataloader_drop_last` leaves no batch at all, so that nothing would be trained."""
    args, rows = trainer.args, trainer.train_dataset
    if not args.dataloader_drop_last or not hasattr(rows, "__len__") or getattr(args, "tokens_per_batch", None):
        return  # a budget of tokens looks by itself
    needed = args.train_batch_size * trainer.accelerator.num_processes // processes_of_a_row(trainer.accelerator)
    if len(rows) < needed:
        raise ValueError(
            f"`dataloader_drop_last=True` leaves none of {len(rows)} row(s), since a batch of all processes has "
            f"{needed}. Leave it out, or lower `per_device_train_batch_size={args.per_device_train_batch_size}`."
        )


def describe_sharing(accelerator: Any) -> dict[str, str]:
    """A line on how rows are shared, and what of the loss is then another one; none where they are not."""
    size = processes_of_a_row(accelerator)
    if size == 1:
        return {}
    shared = f"the tokens of each row shared by {size} processes, by "
    if accelerator.parallelism_config.cp_size > 1:
        return {"context": f"{shared}torch's ring attention"}
    return {"context": f"{shared}DeepSpeed's Ulysses; each micro-batch counts the same, whatever its tokens"}
