"""`otpo pretrain`: pretraining of a Compass model, from a preset or on from a checkpoint, in one stage or several.

Also the module that `accelerate launch -m otpo.cli.pretrain` runs in each process.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import ScriptArguments, TrlParser

from moe_backbone import PRESETS
from moe_backbone.packed_attention import NAME as TORCH_VARLEN
from moe_backbone.pretraining.documents import Stage, read_mixture
from moe_backbone.pretraining.trainer import PretrainingConfig, PretrainingTrainer
from otpo.data.loading import RowArguments

from .launching.engine import count_rows, describe_run
from .launching.expert_parallel import trainer_class
from .launching.shared_rows import rows_in_step
from .models.loading import require_folder
from .options.run_options import Given, RunArguments, make_grouped_parser, read_command_line
from .pretraining.compiling import compile_for_run
from .pretraining.data import find_sources, load_rows
from .pretraining.model import load_tokenizer, make_model
from .pretraining.options import ModelArguments, PretrainArguments, check_options
from .pretraining.stages import describe_stage, plan_stages, stage_settings
from .running.command import REFUSALS, TrainingCommand, refuse, run
from .running.model_card import Origin, with_model_card

_DESCRIPTION = """\
Pretrain a Compass Mixture-of-Experts model on packed documents.

  otpo pretrain --preset compass-tiny --tokenizer_name_or_path TOKENIZER --dataset_name otpo/demo-corpus \\
      --sequence_length 256 --max_steps 200 --output_dir runs/pretrain
  otpo pretrain --preset compass-small --tokenizer_name_or_path TOKENIZER --mixture MIXTURE.yaml --output_dir runs/all
  otpo pretrain --model_name_or_path runs/pretrain --dataset_name more.jsonl --max_steps 100 --output_dir runs/more
  otpo pretrain --config RECIPE.yaml --accelerate_config zero2 --num_processes 8

A mixture lists stages, each with its sources and their weights, its length and its learning rate; they run one after
the other, each in a folder of its own, or one of them with --stage. What a stage says holds unless the command line or
the recipe sets the option. --resume_from_checkpoint true goes on where a run was stopped.
"""


def make_parser() -> TrlParser:
    """The parser of [`PretrainArguments`], [`PretrainingConfig`] and [`ModelArguments`], in this order."""
    return make_grouped_parser(
        "otpo pretrain",
        _DESCRIPTION,
        (PretrainArguments, PretrainingConfig, ModelArguments),
        [
            ("pretraining (otpo)", [PretrainArguments, PretrainingConfig]),
            ("data and run", [RunArguments, RowArguments, ScriptArguments]),
            ("model", [ModelArguments]),
            ("training (transformers)", list(PretrainingConfig.__mro__[1:-1])),
        ],
    )


def make_trainer(data: PretrainArguments, args: PretrainingConfig, model: ModelArguments) -> PretrainingTrainer:
    """Makes or loads the model and packs the documents.

    Raises:
        ValueError: An option, a source or a configuration can't be used.
    """
    set_seed(args.seed)
    train, test, stage = find_sources(data)
    named = model.model_name_or_path
    if named is None and data.preset is None:
        raise ValueError(
            f"No model is named. Set `preset` for a new one ({', '.join(PRESETS)}), or `model_name_or_path`."
        )
    if named is not None:
        require_folder("model_name_or_path", named)
    if data.tokenizer_name_or_path is not None:
        tokenizer = load_tokenizer(data.tokenizer_name_or_path, None, "tokenizer_name_or_path")
    else:
        option = "tokenizer_name_or_path" if named is None else "model_name_or_path"
        tokenizer = load_tokenizer(named, model.model_revision, option)
    compass = make_model(data, args, model, tokenizer, stage)
    config = compass.config
    of_class = trainer_class(PretrainingTrainer, data, config)
    sources = tuple(dict.fromkeys(source.path for source in train))
    parent = data.previous_stage or named
    of_class = with_model_card(of_class, Origin("otpo pretrain", parent, data.preset, sources, True, data.save_code))
    options = (None, None) if data.mixture else ("dataset_train_split", "dataset_test_split")
    rows = load_rows(train, options[0], tokenizer, config, args, streaming=data.dataset_streaming)
    held_out = None
    if args.do_eval or args.eval_strategy != "no":
        if not test:
            raise ValueError("There is nothing to evaluate on. List sources under `evaluation` in the mixture.")
        held_out = load_rows(test, options[1], tokenizer, config, args, streaming=False)
    trainer = of_class(compass, args, rows, held_out, processing_class=tokenizer)
    if data.notes["attention"].startswith(TORCH_VARLEN) and trainer.is_cut(rows):
        data.notes["attention"] = "torch_varlen as sdpa, since one process reads the stream for all"
    data.notes["compiled"] = compile_for_run(trainer, asked=data.compile_layers)
    return trainer


def describe(
    trainer: PretrainingTrainer,
    parsed: tuple[Any, ...],
    stage: Stage | None = None,
    said: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What really runs, line by line; of a `stage` also what it sets and what the options that were `said` do."""
    data, args, model = parsed
    config: Any = trainer.model.config  # pyright: ignore
    rows = rows_in_step(trainer)
    lines = describe_run(trainer, data.previous_stage or model.model_name_or_path or data.preset)
    lines["optimizer"] = trainer.told_optimizer
    lines["experts"] = data.notes["experts"]
    if stage is not None:
        lines["stage"] = describe_stage(stage, args, said or {})
    lines |= data.notes
    lines["data"] = (
        f"{count_rows(trainer.train_dataset)} rows of {args.sequence_length} tokens to train on, "
        f"{count_rows(trainer.eval_dataset)} to evaluate on, {rows} rows ({rows * args.sequence_length:,} tokens) in "
        "a step"
    )
    lines["loss"] = (
        f"next token + {config.effective_mtp_loss_coef:g} x MTP ({config.num_mtp_layers} layers) + "
        f"{config.router_aux_loss_coef:g} x load balance + {config.router_z_loss_coef:g} x z; learning rate "
        f"{args.learning_rate:g}"
    )
    return lines


COMMAND = TrainingCommand("pretrain", make_parser, make_trainer, describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, stage by stage where a mixture has several, and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    try:
        given = read_command_line(parser, argv)
        check_options(given)
        runs = _plan_runs(given)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    for command, words, finished in runs:
        code = run(command, [*argv, *words])
        if code:
            return code
        if finished is not None:
            finished.touch()
    return 0


def _plan_runs(given: Given) -> list[tuple[TrainingCommand, list[str], Path | None]]:
    """The runs to make: each one's command, its own options, and the file to make when it has run."""
    values = given.values
    if not values["mixture"]:
        return [(COMMAND, [], None)]
    mixture = read_mixture(values["mixture"])

    def command(stage: Stage) -> TrainingCommand:
        settings = {"dataset_streaming": mixture.streaming, **stage_settings(stage, given.said)}
        return replace(COMMAND, settings=settings, describe=partial(describe, stage=stage, said=given.said))

    if values["stage"] or len(mixture.stages) == 1:
        stage = mixture.stage(values["stage"]) if values["stage"] else mixture.stages[0]
        return [(command(stage), [], None)]
    plan = plan_stages(mixture.stages, values["output_dir"], values["resume_from_checkpoint"])
    return [(command(stage), [*words, *_report(values, finished)], finished) for stage, words, finished in plan]


def _report(values: Mapping[str, Any], finished: Path) -> list[str]:
    """The option with a report's path of a stage's own, which else the next stage would write over."""
    if values["report"] is None:
        return []
    path = Path(values["report"])
    return ["--report", str(path.with_name(f"{path.stem}_{finished.parent.name}{path.suffix}"))]


if __name__ == "__main__":
    sys.exit(main())
