"""`otpo align`: preference alignment from a recipe or the command line.

Also the module that `accelerate launch -m otpo.cli.align` runs in each process.
"""

import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from otpo import OTPOConfig, OTPOTrainer

from .engine import (
    count_parameters,
    cpu_request,
    describe_device,
    describe_engine,
    requested_engines,
    require_accelerator,
    require_deepspeed,
    require_engine,
)
from .launch import check_options, is_launched, launch
from .loading import load_pairs
from .options import AlignArguments, Given, changed_options, make_parser, read_command_line
from .report import make_report, write_report

# What options, data and models are refused with before the first step; anything else is a fault and keeps its trace.
_REFUSALS = (ValueError, OSError, ImportError)


@dataclass
class Options:
    """The parsed options, by the dataclass that they belong to."""

    run: AlignArguments
    training: OTPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or launches itself where the launcher's options ask for it, and returns the exit code.

    2 for options, data or models that can't be used, with one message on the standard error, or with the whole trace
    where the environment sets OTPO_TRACEBACK.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    begin = time.monotonic()
    parser = make_parser()
    try:
        given = read_command_line(parser, argv)
        if is_launched(os.environ):
            _check_launched(given)
        elif given.launcher or given.recipe_launcher:
            script_args = _with_recipe(argv, given)
            return launch([*given.recipe_launcher, *given.launcher], script_args, given.values["use_cpu"])
        options, trainer, checkpoint = _prepare(parser, given)
    except _REFUSALS as error:
        if os.environ.get("OTPO_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            Console(stderr=True, soft_wrap=True).print(
                f"{parser.prog}: error: {error}", style="red", highlight=False, markup=False
            )
        return 2
    _train(options, trainer, checkpoint)
    _finish(options, trainer, changed_options(given), begin)
    # A model that outlives its process group takes the group's threads down with the interpreter locked, which those
    # of gloo may be waiting for. So it goes first.
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return 0


def _prepare(parser: TrlParser, given: Given) -> tuple[Options, OTPOTrainer, str | None]:
    """Everything up to the first step: options, engine, data, model, and the checkpoint to resume from."""
    values = given.values
    engines = requested_engines(values["deepspeed"], values["fsdp"], os.environ)
    require_accelerator(engines, cpu_request(values["use_cpu"], os.environ))
    require_deepspeed(engines, find_spec("deepspeed") is not None)
    parsed: Any = parser.parse_args_into_dataclasses(given.arguments, look_for_args_file=False)
    options = Options(*parsed)
    model = options.model.model_name_or_path
    if model is None:
        raise ValueError("No model is named. Set `model_name_or_path` to a name on the Hub or a local folder.")
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise ValueError(f"`model_name_or_path={model}`: there is no such folder.")
    checkpoint = find_checkpoint(options.training.resume_from_checkpoint, options.training.output_dir)
    trainer = make_trainer(options)
    require_engine(engines, trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes)
    return options, trainer, checkpoint


def make_trainer(options: Options) -> OTPOTrainer:
    """Loads the pairs and the model."""
    args, model = options.training, options.model
    set_seed(args.seed)  # a mixture's cut draws from the global generators, and must agree across processes
    train, evaluation = load_pairs(options.run, options.mixture, seed=args.seed, evaluate=args.do_eval)
    chosen = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **chosen,
    }
    trainer = OTPOTrainer(
        model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if options.run.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def find_checkpoint(value: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or the last one of `output_dir` for true.

    Raises:
        ValueError: There is no such checkpoint.
    """
    word = str(value).lower()
    if word in {"none", "false", "no", "0", ""}:
        return None
    if word in {"true", "yes", "1"}:
        last = get_last_checkpoint(output_dir) if output_dir and Path(output_dir).is_dir() else None
        if last is None:
            raise ValueError(
                f"`resume_from_checkpoint=true`: there is no checkpoint in `output_dir={output_dir}`. Name the folder "
                "of one, or leave the option out to start anew."
            )
        return last
    if not Path(str(value)).is_dir():
        raise ValueError(f"`resume_from_checkpoint={value}`: there is no such folder.")
    return str(value)


def describe_run(options: Options, trainer: OTPOTrainer) -> dict[str, str]:
    """What really runs, line by line."""
    args = options.training
    total, trainable = count_parameters(trainer.model)
    weighting = args.weighting
    if weighting == "otpo":
        weighting += f", ot_reg {args.ot_reg:g}, ot_reg_m {args.ot_reg_m:g}, ot_cost_scale {args.ot_cost_scale}"
        weighting += f", ot_solver {args.ot_solver}"
    elif weighting == "ld":
        weighting += f", ld_alpha {args.ld_alpha:g}"
    batch = args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    devices = set((getattr(trainer.model, "hf_device_map", None) or {}).values())
    spread = f", the model split over {len(devices)} devices" if len(devices) > 1 else ""
    precision = args.mixed_precision if args.mixed_precision != "no" else "none"
    lines = {
        "model": f"{options.model.model_name_or_path}, {total:,} parameters, {trainable:,} trainable",
        "device": describe_device(trainer.accelerator.device) + spread,
        "engine": describe_engine(trainer.accelerator),
        "precision": f"{next(trainer.model.parameters()).dtype} weights, mixed precision {precision}",
        "weighting": weighting,
        "loss": f"{'+'.join(args.loss_type)}, beta {args.beta:g}, learning rate {args.learning_rate:g}",
        "pairs": f"{_count(trainer.train_dataset)} to train on, {_count(trainer.eval_dataset)} to evaluate on, "
        f"{batch} in a step",
    }
    dropped = {name: sum(counts.values()) for name, counts in trainer.dropped_pairs.items() if counts}
    if dropped:
        lines["dropped"] = ", ".join(f"{count} of {name}" for name, count in dropped.items())
    return lines


def _train(options: Options, trainer: OTPOTrainer, checkpoint: str | None) -> None:
    for name, value in describe_run(options, trainer).items():
        _say(trainer, f"{name:<10} {value}")
    if checkpoint is not None:
        _say(trainer, f"{'resuming':<10} from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()


def _finish(options: Options, trainer: OTPOTrainer, changed: dict[str, Any], begin: float) -> None:
    args = options.training
    trainer.save_model(args.output_dir)
    _say(trainer, f"{'saved':<10} model and tokenizer in {args.output_dir}")
    if options.run.report is not None and trainer.is_world_process_zero():
        write_report(options.run.report, make_report(trainer, changed, time.monotonic() - begin))
        _say(trainer, f"{'report':<10} {options.run.report}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=options.run.dataset_name)


def _check_launched(given: Given) -> None:
    """In a process that a launcher started, the launcher's options are settled; those of a recipe are passed over."""
    if given.launcher:
        raise ValueError(
            f"Unknown option(s) {' '.join(given.launcher)}. Options of the launcher stand before `-m otpo.cli.align`."
        )
    check_options(given.recipe_launcher)


def _with_recipe(argv: list[str], given: Given) -> list[str]:
    """The arguments for the launched processes: ours, and the recipe again."""
    recipe = []
    for position, word in enumerate(argv):
        if word == "--config":
            recipe = argv[position : position + 2]
        elif word.startswith("--config="):
            recipe = [word]
    return [*recipe, *given.arguments]


def _say(trainer: OTPOTrainer, line: str) -> None:
    if trainer.is_world_process_zero():
        Console(soft_wrap=True).print(line, highlight=False, markup=False)


def _count(pairs: Any) -> str:
    if pairs is None:
        return "0"
    return f"{len(pairs):,}" if hasattr(pairs, "__len__") else "a stream"


if __name__ == "__main__":
    sys.exit(main())
