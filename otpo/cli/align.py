"""`otpo align`: preference alignment from a recipe or the command line.

Also the module that `accelerate launch -m otpo.cli.align` runs in each process.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import set_seed
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_quantization_config,
)

from otpo import OTPOConfig, OTPOTrainer
from otpo.data.loading import DataArguments, RowArguments, load_pairs
from otpo.plain_model import has_adapter
from otpo.training.displacement import find_fall
from otpo.weighting.registry import kinds_of

from .launching.engine import count_rows, describe_run
from .launching.shared_rows import rows_in_step
from .models.adapters import adapter_config, adapter_refusals
from .models.experts import Request, read_request, set_trainers_experts
from .models.loading import (
    find_origin,
    load_adapted,
    load_config,
    load_processor,
    load_reference,
    on_one_device,
    require_model,
    require_no_dropout,
    require_same_vocabulary,
    with_model_options,
)
from .options.run_options import RunArguments, make_grouped_parser
from .running.command import TrainingCommand, run

_DESCRIPTION = """\
Align a model on preference pairs, its tokens weighted by optimal transport (OTPO).

  otpo align --model_name_or_path MODEL --dataset_name otpo/demo --output_dir runs/first
  otpo align --config RECIPE.yaml --ot_reg 0.1
  otpo align --config RECIPE.yaml --accelerate_config zero3 --num_processes 4
  accelerate launch -m otpo.cli.align --config RECIPE.yaml
"""


@dataclass
class AlignArguments(RunArguments, DataArguments):
    """Where the pairs come from, what they are measured against, and what is done around the training.

    Parameters:
        ref_model_name_or_path: Reference model, or the folder of an adapter on one. None: the model itself as it
            starts, or the adapter on it.
        ref_model_revision: Its branch, tag or commit.
    """

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model: a name on the Hub, or a folder of a model or adapter. Unset: the model as it "
            "starts (of a new adapter, the model under it)."
        },
    )
    ref_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the reference model."})


def make_parser() -> TrlParser:
    """The parser of [`AlignArguments`], [`OTPOConfig`], `ModelConfig` and `DatasetMixtureConfig`, in this order."""
    return make_grouped_parser(
        "otpo align",
        _DESCRIPTION,
        (AlignArguments, OTPOConfig, ModelConfig, DatasetMixtureConfig),
        [
            ("token weights (otpo)", [OTPOConfig]),
            ("data and run", [RunArguments, RowArguments, DataArguments, ScriptArguments, DatasetMixtureConfig]),
            ("model and adapters", [AlignArguments, ModelConfig]),
            ("preference loss (TRL)", [DPOConfig]),
            ("training (transformers)", OTPOConfig.__mro__[2:-1]),
        ],
    )


def make_trainer(
    data: AlignArguments, args: OTPOConfig, model: ModelConfig, mixture: DatasetMixtureConfig
) -> OTPOTrainer:
    """Loads the pairs, the model and its reference."""
    from .launching.expert_parallel import model_options, trainer_class
    from .models.compass import freeze_adapters_of_mtp, mtp_options

    # What the options contradict each other in, before anything is loaded.
    origin = find_origin("model_name_or_path", require_model(model), model.model_revision)
    experts = read_request(data, args.model_init_kwargs)
    require_no_dropout(model)
    trusted = args.trust_remote_code
    config = load_config(origin, trusted)
    reference: Any = None
    reference_config: Any = None
    if data.ref_model_name_or_path is not None:
        reference = find_origin("ref_model_name_or_path", data.ref_model_name_or_path, data.ref_model_revision)
        reference_config = load_config(reference, trusted)
        require_same_vocabulary("ref_model_name_or_path", config, reference_config)
    set_seed(args.seed)  # what is drawn before the trainer is made must agree across processes
    train, evaluation = load_pairs(data, mixture, seed=args.seed, evaluate=args.do_eval)
    of_class = trainer_class(_with_experts(experts, data), data, config)
    chosen = with_model_options(args.model_init_kwargs, model, origin.revision)
    shared = on_one_device(args, {**model_options(data), **chosen})
    kwargs = {**mtp_options(config), **shared}
    quantization = get_quantization_config(model)
    # TRL loads a model by its name, and from it the reference; an adapter is put on its model here.
    args.model_init_kwargs = None if origin.adapted else kwargs
    other = None
    if reference is not None:
        other = load_reference(reference, args, {**mtp_options(reference_config), **shared}, quantization)
    with adapter_refusals(model):
        trainer = of_class(
            load_adapted(origin, args, kwargs, quantization) if origin.adapted else origin.name,
            other,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=load_processor(origin, trusted),
            quantization_config=None if origin.adapted else quantization,
            peft_config=adapter_config(model),
        )
    freeze_adapters_of_mtp(trainer.model)
    return trainer


def _with_experts(request: Request, data: AlignArguments) -> type[OTPOTrainer]:
    """The trainer whose experts run as asked before its constructor computes the reference, where it does."""

    class Trainer(OTPOTrainer):
        def on_models_loaded(self) -> None:
            set_trainers_experts(request, self, data)

    Trainer.__name__ = OTPOTrainer.__name__
    return Trainer


def describe(trainer: OTPOTrainer, parsed: tuple[Any, ...]) -> dict[str, str]:
    """What really runs, line by line."""
    from .models.compass import describe_mtp

    args: OTPOConfig = parsed[1]
    weighting = args.describe_weighting()
    if any(kind.bundle is not None for kind in kinds_of(args.weighting)):
        weighting += f", ot_solver {args.ot_solver}"
    lines = {
        **describe_run(trainer, parsed[2].model_name_or_path),
        "reference": describe_reference(trainer, parsed[0]),
        "weighting": weighting,
        "loss": f"{'+'.join(args.loss_type)}, beta {args.beta:g}, learning rate {args.learning_rate:g}",
        "rows": trainer.layout.describe(),
        "pairs": f"{count_rows(trainer.train_dataset)} to train on, {count_rows(trainer.eval_dataset)} to evaluate "
        f"on, {describe_step(trainer)}",
        **parsed[0].notes,
        **describe_mtp(trainer.model),
    }
    dropped = {name: sum(counts.values()) for name, counts in trainer.dropped_pairs.items() if counts}
    if dropped:
        lines["dropped"] = ", ".join(f"{count} of {name}" for name, count in dropped.items())
    return lines


def describe_step(trainer: OTPOTrainer) -> str:
    """How many pairs a step of the optimizer has; by `tokens_per_batch`, on average."""
    budget = trainer.token_budget()
    if budget is None:
        return f"{rows_in_step(trainer)} in a step"
    pairs = budget.pairs_per_batch * budget.processes * trainer.args.gradient_accumulation_steps
    batches = f"micro-batches of up to {budget.budget:,} tokens, {budget.pairs_per_batch:,.1f} pairs on average"
    return f"about {pairs:,.1f} in a step: {batches}"


def describe_reference(trainer: OTPOTrainer, data: AlignArguments) -> str:
    """What the log-probabilities are measured against."""
    name = data.ref_model_name_or_path
    if name is not None:
        revision = "" if data.ref_model_revision == "main" else f", {data.ref_model_revision}"
        text = f"{name}{revision}"
    elif not has_adapter(trainer.model):
        text = "the model as it starts"
    elif "ref" in trainer.model.peft_config:
        text = "the adapter as it starts, on the same model"
    else:
        text = "the model without its adapter"
    return f"{text}, log-probabilities computed beforehand" if trainer.precompute_ref_logps else text


def extra_report(trainer: OTPOTrainer) -> dict[str, Any]:
    """The pairs that were left out, by dataset and reason, and whether chosen answers became less likely."""
    fall = find_fall(trainer.state.log_history, trainer.beta)
    return {
        "dropped_pairs": {name: dict(counts) for name, counts in trainer.dropped_pairs.items()},
        "chosen_fell": None if fall is None else fall._asdict(),
    }


def remarks(trainer: OTPOTrainer) -> dict[str, str]:
    """A line where chosen answers became less likely."""
    fall = find_fall(trainer.state.log_history, trainer.beta)
    return {} if fall is None else {"chosen": fall.describe()}


COMMAND = TrainingCommand("align", make_parser, make_trainer, describe, extra_report, remarks)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `otpo align`; see [`otpo.cli.running.command.run`]."""
    return run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
