"""What the training commands share: reading options, launching themselves, refusals, training, saving, report."""

import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from rich.console import Console
from safetensors import SafetensorError
from trl import TrlParser
from yaml import YAMLError

from otpo.cli.launching.engine import (
    cpu_request,
    requested_engines,
    require_accelerator,
    require_deepspeed,
    require_engine,
)
from otpo.cli.launching.failures import FOLDER, came_later, note, rank, say_error
from otpo.cli.launching.interrupt import interruptible, leave
from otpo.cli.launching.launch import check_options, default_launch, is_launched, launch, module_of
from otpo.cli.launching.shared_rows import require_a_batch, require_right_gradients, require_whole_rows
from otpo.cli.options.preflight import check_options_alone
from otpo.cli.options.redact import redact_text
from otpo.cli.options.run_options import Given, changed_options, read_command_line
from otpo.data.preferences import RowError
from otpo.trl_seam import leave_boolean_buffers_to_ranks, use_one_gpu

from .checkpoints import find_checkpoint, newest_checkpoint
from .console import be_quiet, show_little
from .identity import RunFile, require_same_run, run_identity
from .model_card import WritesCard
from .report import make_report, write_report

# What options, data and models are refused with before the first step; anything else is a fault and keeps its trace.
REFUSALS = (
    *(ValueError, OSError, ImportError, NotImplementedError),
    *(DatasetsError, SafetensorError, TemplateError, YAMLError),
)
_DEFAULT_OUTPUT = "trainer_output"  # of `transformers.TrainingArguments`
_LAST_WORD = 1.0  # seconds that the other processes leave to the first before the launcher ends it


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
        remarks: Lines to print at the end, of what a user should know of the training, by their names.
        settings: Options that hold where neither the recipe nor the command line sets them.
    """

    name: str
    make_parser: Callable[[], TrlParser]
    make_trainer: Callable[..., Any]
    describe: Callable[[Any, tuple[Any, ...]], dict[str, str]]
    extra_report: Callable[[Any], dict[str, Any]] = lambda trainer: {}
    remarks: Callable[[Any], dict[str, str]] = lambda trainer: {}
    settings: Mapping[str, Any] = field(default_factory=dict)


def run(command: TrainingCommand, argv: Sequence[str] | None = None) -> int:
    """Trains, or launches itself where the launcher's options ask for it, and returns the exit code.

    2 for options, data or models that can't be used, with one message on the standard error, or with the whole trace
    where the environment sets OTPO_TRACEBACK. 130 after Ctrl-C, with one message that says how to go on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = ["--help"] if "--help-all" in argv else argv
    since = time.time()
    read: list[Given] = []
    prog = f"otpo {command.name}"
    try:
        code = interruptible(prog, lambda: _run(command, argv, read), lambda: _how_to_resume(read, since))
    except Exception as error:
        code = _fail(prog, error, verbose=bool(read) and read[0].values["verbose"])
    if code and FOLDER in os.environ:  # the launcher waits for the end of this process to say what it was of
        leave(code)
    return code


def _run(command: TrainingCommand, argv: list[str], read: list[Given]) -> int:
    """[`run`]; puts the options into `read` as soon as they are read."""
    # Options are read and checked, then processes are launched, unless this one was; each of them prepares a trainer.
    begin = time.monotonic()
    parser = command.make_parser()
    try:
        given = read_command_line(parser, argv, command.settings)
        read.append(given)
        if not given.values["verbose"]:
            be_quiet()
        check_options_alone(given.values)
        checkpoint, line = _checkpoint(parser, given)
        if is_launched(os.environ):
            _check_launched(command, given)
        else:
            options = [*given.recipe_launcher, *given.launcher]
            if not options:
                options = default_launch(torch.accelerator.device_count(), given.values, os.environ)
                if options:
                    count = options[options.index("--num_processes") + 1]
                    _print(f"{'launching':<10} {count} processes, one a device; `--num_processes 1` takes one of them")
            if options:
                values = given.values
                return launch(options, command.name, _with_recipe(argv, given), values["use_cpu"], values["verbose"])
        parsed, trainer = _prepare(command, parser, given, checkpoint)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    except TypeError as error:
        return refuse(parser.prog, _unknown_name(error, read))

    # The header says what really runs.
    lines = command.describe(trainer, parsed)
    if parsed[0].expert_parallel_size != 1:
        from otpo.cli.launching.expert_parallel import describe_native

        lines |= describe_native(parsed[0], trainer.model)

    # Training, then the model's folder and the report.
    if not parsed[0].verbose:
        show_little(trainer)
    trainer.add_callback(RunFile(run_identity(parser.dataclass_types, {**given.values, **parsed[0].resolved})))
    try:
        _train({**lines, **line}, trainer, checkpoint)
    except RowError as error:  # of a stream, whose rows are looked at when they are read
        return refuse(parser.prog, RowError(str(error).strip().rpartition("RowError: ")[2]))
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
    """Says in one line what can't be used, or raises it where the environment sets OTPO_TRACEBACK; returns 2.

    A process that `otpo` launched leaves the line to the one that launched it.
    """
    if os.environ.get("OTPO_TRACEBACK"):
        raise error
    message = redact_text(" ".join(str(error).split()))
    if note(message, error, refused=True) is not None:
        return 2
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_LAST_WORD)  # the launcher ends this process where the first one has refused, too
        message = f"the process of rank {rank()}: {message}"
    say_error(prog, message)
    return 2


def _fail(prog: str, error: Exception, verbose: bool) -> int:
    """Notes a fault, and raises it; one that came after another process's is a line, and 1 is returned."""
    message = redact_text(" ".join(f"{type(error).__name__}: {error}".split()))
    failure = note(message, error, refused=False)
    if failure is None or verbose or not came_later(failure):
        raise error
    say_error(prog, f"the process of rank {failure.rank} failed after another one; `--verbose` shows where: {message}")
    return 1


def _checkpoint(parser: TrlParser, given: Given) -> tuple[str | None, dict[str, str]]:
    """The checkpoint to resume from, which must be of this run, and the line that says so."""
    values = given.values
    checkpoint = find_checkpoint(values["resume_from_checkpoint"], values["output_dir"] or _DEFAULT_OUTPUT)
    if checkpoint is None:
        return None, {}
    known = require_same_run(run_identity(parser.dataclass_types, values), checkpoint)
    return checkpoint, {
        "resuming": f"from {checkpoint}{'' if known else ', which does not tell the run that it is of'}"
    }


def _how_to_resume(read: Sequence[Given], since: float) -> str:
    """What Ctrl-C leaves: the run's last checkpoint and the way to go on from it."""
    values = read[0].values if read else {}
    folder = values.get("output_dir") or _DEFAULT_OUTPUT
    resumed = str(values.get("resume_from_checkpoint")).lower() in ("true", "yes", "1")
    checkpoint = newest_checkpoint(folder, None if resumed else since) if read else None
    if checkpoint is None:
        return "there is no checkpoint yet to resume from"
    if checkpoint != newest_checkpoint(folder):  # `true` would go on from a later step of an earlier run
        return f"resume with the same command and `--resume_from_checkpoint {checkpoint}`"
    return f"resume with the same command and `--resume_from_checkpoint true`, which goes on from {checkpoint}"


def _unknown_name(error: TypeError, read: Sequence[Given]) -> ValueError:
    """A `TypeError` for a name that a mapping among the options gave to a function; any other is raised as it is."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    name = found[1] if found else None
    for option, value in read[0].values.items() if name and read else ():
        with suppress(ValueError):
            content = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
            if isinstance(content, dict) and name in content:
                return ValueError(f"`{option}` has the name `{name}`, which is not known: {error}.")
    raise error


def _prepare(
    command: TrainingCommand, parser: TrlParser, given: Given, checkpoint: str | None
) -> tuple[tuple[Any, ...], Any]:
    """Everything up to the first step: options, engine, data and model, which must fit the checkpoint to resume."""
    from otpo.cli.models import compass  # noqa: F401 - makes its models known to the Auto classes

    values, arguments = given.values, given.arguments
    if values["save_code"] and values.get("use_peft"):
        raise ValueError(
            "`save_code=true` with `use_peft`: an adapter is saved without its model, and so without code. Leave "
            "`save_code` out, and save the model with it."
        )
    spreads = values["expert_parallel_size"] != 1 and values["expert_parallel_backend"] == "deepspeed"
    if values["expert_exchange"] != "auto" and not spreads:
        raise ValueError(
            f"`expert_exchange={values['expert_exchange']}` is of experts that DeepSpeed spreads, and nothing spreads "
            "them so. Set `expert_parallel_size`, or leave it out."
        )
    engines = requested_engines(values["deepspeed"], values["fsdp"], os.environ)
    require_whole_rows(command.name, engines, os.environ, values)
    if values["expert_parallel_size"] != 1:
        from otpo.cli.launching.expert_parallel import prepare

        arguments = [*arguments, *prepare(values, os.environ)]
        if values["expert_parallel_backend"] == "deepspeed":
            engines["DEEPSPEED"] = f"`expert_parallel_size={values['expert_parallel_size']}`"
    else:
        require_accelerator(engines, cpu_request(values["use_cpu"], os.environ))
    require_deepspeed(engines, find_spec("deepspeed") is not None)
    parsed: Any = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    training = parsed[1]
    use_one_gpu(training)  # else a process that sees several devices would copy the model to each
    trainer = command.make_trainer(*parsed)
    if parsed[0].ignore_bias_buffers:
        leave_boolean_buffers_to_ranks(trainer.model)
    require_engine(engines, trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes)
    require_right_gradients(trainer.accelerator)
    require_a_batch(trainer)
    if checkpoint is not None:
        from otpo.cli.launching.expert_parallel import check_checkpoint

        check_checkpoint(checkpoint, trainer)
    return tuple(parsed), trainer


def _train(lines: dict[str, str], trainer: Any, checkpoint: str | None) -> None:
    for name, value in lines.items():
        _say(trainer, f"{name:<10} {value}")
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
    for name, remark in command.remarks(trainer).items():
        _say(trainer, f"{name:<10} {remark}")
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
        _print(line)


def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False, markup=False)
