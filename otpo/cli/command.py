"""What the training commands share: reading options, launching themselves, refusals, training, saving, report."""

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, TrlParser

from .engine import cpu_request, requested_engines, require_accelerator, require_deepspeed, require_engine
from .launch import check_options, is_launched, launch, module_of
from .model_card import WritesCard
from .options import Given, changed_options, read_command_line
from .report import make_report, write_report

# What options, data and models are refused with before the first step; anything else is a fault and keeps its trace.
REFUSALS = (ValueError, OSError, ImportError)


@dataclass(frozen=True)
class TrainingCommand:
    """A command of `otpo` that trains something; [`run`] does all that they share.

    Attributes:
        name: Of the command; its module `otpo.cli.{name}` is what each launched process runs.
        make_parser: Makes its parser, whose dataclasses start with one that has the options of [`RunArguments`] and
            `trl.ScriptArguments`, and one of `TrainingArguments`.
        make_trainer: From the parsed dataclasses, in the parser's order, to a trainer that is ready: data and model.
            What can't be used raises a `ValueError`, `OSError` or `ImportError`.
        describe: Lines to print before the first step, by their names of up to 10 characters.
        extra_report: Entries of the report that only this command has.
    """

    name: str
    make_parser: Callable[[], TrlParser]
    make_trainer: Callable[..., Any]
    describe: Callable[[Any, tuple[Any, ...]], dict[str, str]]
    extra_report: Callable[[Any], dict[str, Any]] = lambda trainer: {}


def run(command: TrainingCommand, argv: Sequence[str] | None = None) -> int:
    """Trains, or launches itself where the launcher's options ask for it, and returns the exit code.

    2 for options, data or models that can't be used, with one message on the standard error, or with the whole trace
    where the environment sets OTPO_TRACEBACK.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    begin = time.monotonic()
    parser = command.make_parser()
    try:
        given = read_command_line(parser, argv)
        if is_launched(os.environ):
            _check_launched(command, given)
        elif given.launcher or given.recipe_launcher:
            script_args = _with_recipe(argv, given)
            options = [*given.recipe_launcher, *given.launcher]
            return launch(options, command.name, script_args, given.values["use_cpu"])
        parsed, trainer, checkpoint = _prepare(command, parser, given)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    lines = command.describe(trainer, parsed)
    if parsed[0].expert_parallel_size != 1:
        from .expert_parallel import describe_native

        lines |= describe_native(parsed[0], trainer.model)
    _train(lines, trainer, checkpoint)
    _finish(command, parsed, trainer, changed_options(given), begin)
    # A model that outlives its process group takes the group's threads down with the interpreter locked, which those
    # of gloo may be waiting for. So it goes first.
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return 0


def refuse(prog: str, error: Exception) -> int:
    """Says in one line what can't be used, or raises it where the environment sets OTPO_TRACEBACK; returns 2."""
    if os.environ.get("OTPO_TRACEBACK"):
        raise error
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Console(stderr=True, soft_wrap=True).print(
            f"{prog}: error: {error}", style="red", highlight=False, markup=False
        )
    return 2


def require_model(model: ModelConfig) -> str:
    """The model's name or folder.

    Raises:
        ValueError: None is named, or it is a folder that does not exist.
    """
    name = model.model_name_or_path
    if name is None:
        raise ValueError("No model is named. Set `model_name_or_path` to a name on the Hub or a local folder.")
    require_folder("model_name_or_path", name)
    return name


def require_folder(option: str, name: str) -> None:
    """Raises a `ValueError` if an option's value is plainly a path and there is no such folder."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(f"`{option}={name}`: there is no such folder.")


def with_model_options(chosen: Any, model: ModelConfig) -> dict[str, Any]:
    """`model_init_kwargs` as the options of `model` set them; those of `chosen`, a recipe's mapping or None, win."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(chosen if isinstance(chosen, dict) else {}),
    }


def find_checkpoint(value: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or the last whole one of `output_dir` for true.

    Raises:
        ValueError: There is no such checkpoint.
    """
    word = str(value).lower()
    if word in {"none", "false", "no", "0", ""}:
        return None
    if word in {"true", "yes", "1"}:
        last = _last_whole_checkpoint(output_dir)
        if last is None:
            raise ValueError(
                f"`resume_from_checkpoint=true`: there is no checkpoint in `output_dir={output_dir}`. Name the folder "
                "of one, or leave the option out to start anew."
            )
        return last
    if not Path(str(value)).is_dir():
        raise ValueError(f"`resume_from_checkpoint={value}`: there is no such folder.")
    return str(value)


def _last_whole_checkpoint(output_dir: str | None) -> str | None:
    """The last checkpoint that was written to its end, which a run killed while saving leaves behind it."""
    steps = {
        int(path.name.rpartition("-")[2]): str(path)
        for path in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*")
        if (path / TRAINER_STATE_NAME).is_file()  # the Trainer writes it last
    }
    return steps[max(steps)] if output_dir and steps else None


def _prepare(command: TrainingCommand, parser: TrlParser, given: Given) -> tuple[tuple[Any, ...], Any, str | None]:
    """Everything up to the first step: options, engine, data, model, and the checkpoint to resume from."""
    from . import compass  # noqa: F401 - makes its models known to the Auto classes

    values, arguments = given.values, given.arguments
    if values["save_code"] and values["use_peft"]:
        raise ValueError(
            "`save_code=true` with `use_peft`: an adapter is saved without its model, and so without code. Leave "
            "`save_code` out, and save the model with it."
        )
    engines = requested_engines(values["deepspeed"], values["fsdp"], os.environ)
    if values["expert_parallel_size"] != 1:
        from .expert_parallel import prepare

        arguments = [*arguments, *prepare(values, os.environ)]
        if values["expert_parallel_backend"] == "deepspeed":
            engines["DEEPSPEED"] = f"`expert_parallel_size={values['expert_parallel_size']}`"
    else:
        require_accelerator(engines, cpu_request(values["use_cpu"], os.environ))
    require_deepspeed(engines, find_spec("deepspeed") is not None)
    parsed: Any = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    training = parsed[1]
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    trainer = command.make_trainer(*parsed)
    if parsed[0].ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    require_engine(engines, trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes)
    if checkpoint is not None:
        from .expert_parallel import check_checkpoint

        check_checkpoint(checkpoint, trainer)
    return tuple(parsed), trainer, checkpoint


def _train(lines: dict[str, str], trainer: Any, checkpoint: str | None) -> None:
    for name, value in lines.items():
        _say(trainer, f"{name:<10} {value}")
    if checkpoint is not None:
        _say(trainer, f"{'resuming':<10} from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()


def _finish(
    command: TrainingCommand, parsed: tuple[Any, ...], trainer: Any, changed: dict[str, Any], begin: float
) -> None:
    run_options, args = parsed[:2]
    trainer.save_model(args.output_dir)
    if issubclass(type(trainer), WritesCard):
        trainer.create_model_card()
    _say(
        trainer,
        f"{'saved':<10} model{', its code' if run_options.save_code else ''} and tokenizer in {args.output_dir}",
    )
    if run_options.report is not None and trainer.is_world_process_zero():
        report = make_report(trainer, changed, time.monotonic() - begin, command.extra_report(trainer))
        write_report(run_options.report, report)
        _say(trainer, f"{'report':<10} {run_options.report}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=run_options.dataset_name)


def _check_launched(command: TrainingCommand, given: Given) -> None:
    """In a process that a launcher started, the launcher's options are settled; those of a recipe are passed over."""
    if given.launcher:
        raise ValueError(
            f"Unknown option(s) {' '.join(given.launcher)}. Options of the launcher stand before "
            f"`-m {module_of(command.name)}`."
        )
    check_options(given.recipe_launcher, command.name)


def _with_recipe(argv: list[str], given: Given) -> list[str]:
    """The arguments for the launched processes: ours, and the recipe again."""
    recipe = []
    for position, word in enumerate(argv):
        if word == "--config":
            recipe = argv[position : position + 2]
        elif word.startswith("--config="):
            recipe = [word]
    return [*recipe, *given.arguments]


def _say(trainer: Any, line: str) -> None:
    if trainer.is_world_process_zero():
        Console(soft_wrap=True).print(line, highlight=False, markup=False)
