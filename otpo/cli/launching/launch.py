"""Starting a training command in several processes through accelerate's own launcher."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import psutil
import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from otpo.cli.options.recipe import read_yaml

from .engine import ENGINES, cpu_request, require_accelerator, require_deepspeed
from .failures import collected, noted, outcome, say_error
from .interrupt import EXIT_CODE, OTPO_LAUNCHER
from .shared_rows import require_sharing_that_is_read

_LOGGERS = ("torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.multiprocessing.api")
_PATIENCE = 5.0  # seconds in which a process that was told to stop ends
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_SIGNAL_BASE = 128  # a shell's exit code for a process that a signal ended


def bundled_configs() -> dict[str, Path]:
    """Names and files of the accelerate configurations that come with otpo."""
    folder = Path(str(files("otpo.cli").joinpath("accelerate_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve_config(name: str) -> str:
    """The path of the accelerate configuration of that path, or of that name among otpo's and then TRL's.

    Raises:
        ValueError: There is none; the message lists otpo's names.
    """
    if Path(name).is_file():
        return name
    if name in bundled_configs():
        return str(bundled_configs()[name])
    try:
        return resolve_accelerate_config_argument(["--accelerate_config", name])[1]
    except ValueError as error:
        raise ValueError(
            f"`accelerate_config={name!r}` is neither a file nor a name among {sorted(bundled_configs())} and those "
            "of TRL."
        ) from error


def module_of(command: str) -> str:
    """The module of a command of `otpo`, which each of its processes runs."""
    return f"otpo.cli.{command}"


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether accelerate or torchrun started this process."""
    return "LOCAL_RANK" in environ or "ACCELERATE_DYNAMO_BACKEND" in environ


def default_launch(devices: int, values: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """The launcher's options for a command that was given none: a process on each of several GPUs.

    Empty where one process is right: with one GPU or none, on the CPU, and where the model is to be split or placed
    by hand, which a `device_map` asks for, or is quantized, which may be what makes it fit one GPU or several; and in
    a process that MPI or Slurm started beside others.

    Args:
        devices: Number of visible accelerators.
        values: Value of each option of the command.
        environ: The environment.
    """
    if any(int(environ.get(name) or 1) > 1 for name in _WORLD_SIZES):  # a launcher that accelerate knows began it
        return []
    kwargs = values.get("model_init_kwargs")
    chosen = json.loads(kwargs) if isinstance(kwargs, str) else kwargs or {}
    placed = ("device_map", "quantization_config", "tp_plan", "max_memory")
    by_hand = any(chosen.get(name) is not None for name in placed)
    quantized = values.get("load_in_4bit") or values.get("load_in_8bit")
    if devices < 2 or by_hand or quantized or cpu_request(values["use_cpu"], environ) is not None:
        return []
    # The training options set the precision, as they do in one process.
    return ["--accelerate_config", "ddp", "--num_processes", str(devices), "--mixed_precision", "no"]


def check_options(options: Sequence[str], command: str) -> list[str]:
    """The options of the launcher for a command, as accelerate's own: `--accelerate_config` is its `--config_file`.

    Raises:
        ValueError: An option is unknown, or there is no such configuration.
    """
    parser = argparse.ArgumentParser(prog=f"otpo {command}", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--accelerate_config", "--accelerate-config")
    accelerate = launch_command_parser()
    accelerate.exit_on_error = False  # its usage is that of another program
    try:
        found, kept = parser.parse_known_args(list(options))
        # A value without its option would be taken for the script.
        args, unknown = accelerate.parse_known_args([*kept, module_of(command)])
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0].lstrip("-")
        # The script's name in the place of a value that was left out.
        reason = "expected one argument" if module_of(command) in error.message else error.message
        raise ValueError(f"`{name}`, an option of the launcher: {reason}.") from error
    if unknown or args.training_script != module_of(command) or args.training_script_args:
        raise ValueError(
            f"Unknown option among {kept}. `otpo {command} --help` lists the options of the training, `accelerate "
            "launch --help` those of the launcher."
        )
    for name in ("num_processes", "num_machines"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}={getattr(args, name)}`, an option of the launcher, must be at least 1.")
    name = found.accelerate_config
    return kept if name is None else [*kept, "--config_file", resolve_config(name)]


def parse_launch(options: Sequence[str], command: str, script_args: Sequence[str], use_cpu: bool = False) -> Any:
    """Accelerate's launch arguments for our options.

    Args:
        options: Options of `accelerate launch`, and `--accelerate_config NAME_OR_PATH`.
        command: Command of `otpo` that is started, such as `"align"`.
        script_args: Its arguments.
        use_cpu: Whether the training options ask for the CPU.

    Raises:
        ValueError: An option is unknown, there is no such configuration, or accelerate would start something else
            than was asked for.
    """
    # accelerate's own parser reads its options; the first of `args` that it would misread is refused.
    options = check_options(options, command)
    args = launch_command_parser().parse_args([*options, "--module", module_of(command), *script_args])

    # The engine that options and configuration ask for has to be one that can run here.
    config = _load_config(args.config_file) if args.config_file else None
    has_default = os.path.isfile(default_config_file)
    engine = getattr(config, "distributed_type", None)
    kinds = {"DEEPSPEED": args.use_deepspeed, "FSDP": args.use_fsdp}
    asked = {name: f"`--use_{name.lower()}`" for name in ENGINES if kinds[name]}
    if engine is not None and engine.value in ENGINES and not asked:
        asked = {engine.value: f"`accelerate_config={Path(args.config_file).stem}`"}
    on_cpu = "`--cpu`" if args.cpu else "`use_cpu=True`" if use_cpu else None
    require_accelerator(asked, on_cpu)
    require_deepspeed(asked, find_spec("deepspeed") is not None)

    if config is not None or not has_default:
        require_sharing_that_is_read(args, config)

    # As many processes as the configuration wants: -1 is our word for one on each device.
    if args.num_processes is None and isinstance(config, ClusterConfig) and config.num_processes == -1:
        args.num_processes = max(1, torch.accelerator.device_count())
    # A plain launch takes several processes for granted on several GPUs alone, and starts one otherwise.
    plural = (args.num_processes or 1) > 1
    if plural and args.cpu and args.mpirun_hostfile is None:
        raise ValueError(
            f"`--cpu` with `--num_processes {args.num_processes}` starts one process in accelerate, unless "
            "`--mpirun_hostfile` is set. Use `--use_cpu` in place of `--cpu`."
        )
    if plural and engine is not None and engine.value == "NO" and not (asked or args.multi_gpu):
        raise ValueError(
            f"`num_processes={args.num_processes}` with `accelerate_config={Path(args.config_file).stem}`, which "
            "starts one process. Set `--num_processes 1`, or `--accelerate_config ddp`."
        )
    if config is None and not has_default:
        args.multi_gpu = args.multi_gpu or (plural and not asked and not args.cpu)
        # Accelerate's own defaults, which it warns of; the training options set the precision.
        args.num_machines = args.num_machines or 1
        args.mixed_precision = args.mixed_precision or "no"
        args.dynamo_backend = args.dynamo_backend or "no"
    return args


def launch(
    options: Sequence[str], command: str, script_args: Sequence[str], use_cpu: bool = False, verbose: bool = False
) -> int:
    """Runs the command's module under accelerate and returns the exit code of the process that failed first.

    The last line on the standard error is what that process failed of.

    Args:
        options: See [`parse_launch`], as are `command`, `script_args` and `use_cpu`.
        command: See there.
        script_args: See there.
        use_cpu: See there.
        verbose: Whether what torch's launcher says of failures is shown too, before that line.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped it, and the processes have ended.
    """
    args = parse_launch(options, command, script_args, use_cpu)
    for name in () if verbose else _LOGGERS:  # what the processes themselves say is enough
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[OTPO_LAUNCHER] = "1"
    with collected() as folder:
        try:
            launch_command(args)
        except CalledProcessError as error:
            return _failed(command, error.returncode, None, folder)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if verbose:
                sys.stderr.write(f"{error}\n")
            return _failed(command, failure.exitcode, rank, folder)
        except SignalException as error:
            return _exit_code(-error.sigval)
        except KeyboardInterrupt:
            _end_children()
            raise
        finally:
            del os.environ[OTPO_LAUNCHER]
    return 0


def _failed(command: str, code: int, rank: int | None, folder: str) -> int:
    """Says what the first process failed of, unless it was told to end; returns the exit code."""
    if code not in (EXIT_CODE, -signal.SIGINT):
        line, code = outcome(noted(folder), code, rank)
        if line is not None:
            say_error(f"otpo {command}", line)
    return _exit_code(code)


def _load_config(path: str) -> Any:
    """An accelerate configuration; a `ValueError` names the file that is none."""
    content = read_yaml("--accelerate_config", path)
    if not isinstance(content, dict):
        raise ValueError(f"`--accelerate_config {path}`: a configuration is a YAML mapping, got {content!r:.60}.")
    try:
        return load_config_from_file(path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"`--accelerate_config {path}` is no configuration of accelerate: {error}.") from error


def _end_children() -> None:
    """Waits for the launched process, which a terminal's Ctrl-C reaches too, and ends it where it does not."""
    pending = psutil.Process().children()
    for end in (lambda child: None, lambda child: child.send_signal(signal.SIGINT), psutil.Process.kill):
        for child in pending:
            with suppress(psutil.NoSuchProcess):
                end(child)
        pending = psutil.wait_procs(pending, timeout=_PATIENCE)[1]


def _exit_code(code: int) -> int:
    if code in (EXIT_CODE, -signal.SIGINT):
        raise KeyboardInterrupt
    return code if code >= 0 else _SIGNAL_BASE - code
