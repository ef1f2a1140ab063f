"""`otpo align`: preference alignment from a recipe or the command line.

Also the module that `accelerate launch -m otpo.cli.align` runs in each process.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, set_seed
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from otpo import OTPOConfig, OTPOTrainer

from .command import TrainingCommand, require_model, run, with_model_options
from .engine import count_rows, describe_run, rows_in_step
from .loading import DataArguments, load_pairs
from .options import RunArguments, make_grouped_parser

_DESCRIPTION = """\
Align a model on preference pairs, its tokens weighted by optimal transport (OTPO).

  otpo align --model_name_or_path MODEL --dataset_name otpo/demo --output_dir runs/first
  otpo align --config RECIPE.yaml --ot_reg 0.1
  otpo align --config RECIPE.yaml --accelerate_config zero3 --num_processes 4
  accelerate launch -m otpo.cli.align --config RECIPE.yaml
"""


@dataclass
class AlignArguments(RunArguments, DataArguments):
    """Where the pairs come from, and what is done around the training."""


def make_parser() -> TrlParser:
    """The parser of [`AlignArguments`], [`OTPOConfig`], `ModelConfig` and `DatasetMixtureConfig`, in this order."""
    return make_grouped_parser(
        "otpo align",
        _DESCRIPTION,
        (AlignArguments, OTPOConfig, ModelConfig, DatasetMixtureConfig),
        [
            ("token weights (otpo)", [OTPOConfig]),
            ("data and run", [RunArguments, DataArguments, ScriptArguments, DatasetMixtureConfig]),
            ("model and adapters", [ModelConfig]),
            ("preference loss (TRL)", [DPOConfig]),
            ("training (transformers)", OTPOConfig.__mro__[2:-1]),
        ],
    )


def make_trainer(
    data: AlignArguments, args: OTPOConfig, model: ModelConfig, mixture: DatasetMixtureConfig
) -> OTPOTrainer:
    """Loads the pairs and the model."""
    from .compass import freeze_adapters_of_mtp, mtp_options
    from .expert_parallel import model_options, trainer_class

    name = require_model(model)
    set_seed(args.seed)  # a mixture's cut draws from the global generators, and must agree across processes
    train, evaluation = load_pairs(data, mixture, seed=args.seed, evaluate=args.do_eval)
    config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    of_class = trainer_class(OTPOTrainer, data, config)
    args.model_init_kwargs = {
        **model_options(data),
        **mtp_options(config),
        **with_model_options(args.model_init_kwargs, model),
    }
    trainer = of_class(
        name,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    freeze_adapters_of_mtp(trainer.model)
    return trainer


def describe(trainer: OTPOTrainer, parsed: tuple[Any, ...]) -> dict[str, str]:
    """What really runs, line by line."""
    from .compass import describe_mtp

    args: OTPOConfig = parsed[1]
    weighting = args.describe_weighting()
    if args.weighting == "otpo":
        weighting += f", ot_solver {args.ot_solver}"
    lines = {
        **describe_run(trainer, parsed[2].model_name_or_path),
        "weighting": weighting,
        "loss": f"{'+'.join(args.loss_type)}, beta {args.beta:g}, learning rate {args.learning_rate:g}",
        "pairs": f"{count_rows(trainer.train_dataset)} to train on, {count_rows(trainer.eval_dataset)} to evaluate "
        f"on, {rows_in_step(trainer)} in a step",
        **describe_mtp(trainer.model),
    }
    dropped = {name: sum(counts.values()) for name, counts in trainer.dropped_pairs.items() if counts}
    if dropped:
        lines["dropped"] = ", ".join(f"{count} of {name}" for name, count in dropped.items())
    return lines


def extra_report(trainer: OTPOTrainer) -> dict[str, Any]:
    """The pairs that were left out, by dataset and reason."""
    return {"dropped_pairs": {name: dict(counts) for name, counts in trainer.dropped_pairs.items()}}


COMMAND = TrainingCommand("align", make_parser, make_trainer, describe, extra_report)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `otpo align`; see [`otpo.cli.command.run`]."""
    return run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
