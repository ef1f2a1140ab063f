"""`otpo sft`: supervised fine-tuning on instructions and their answers, from a recipe or the command line.

Also the module that `accelerate launch -m otpo.cli.sft` runs in each process.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import set_seed
from transformers.utils import logging
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_quantization_config,
)
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from otpo.data.instruction_checks import check_instructions, instruction_form, is_conversational
from otpo.data.loading import RowArguments, load_rows

from .launching.engine import count_rows, describe_run
from .launching.shared_rows import describe_sharing, rows_in_step
from .models.adapters import adapter_config, adapter_refusals
from .models.experts import read_request, set_trainers_experts
from .models.loading import (
    find_origin,
    load_adapted,
    load_config,
    load_processor,
    on_one_device,
    require_model,
    require_no_dropout,
    with_model_options,
)
from .options.run_options import RunArguments, make_grouped_parser
from .running.command import TrainingCommand, run
from .running.model_card import Origin, with_model_card

logger = logging.get_logger(__name__)

_DESCRIPTION = """\
Fine-tune a model on instructions: rows of 'messages', or of 'prompt' and 'completion'.

  otpo sft --model_name_or_path MODEL --dataset_name otpo/demo-instructions --output_dir runs/sft
  otpo sft --config RECIPE.yaml --packing --max_length 4096
  otpo sft --config RECIPE.yaml --use_peft --lora_target_modules q_proj k_proj v_proj o_proj \\
      --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj --lora_dropout 0
  accelerate launch -m otpo.cli.sft --config RECIPE.yaml

The loss counts the tokens of the answers: of 'completion', or of the assistant's turns in 'messages', for which the
chat template needs {% generation %} markers, or has to be one of those that TRL knows. --completion_only_loss false
counts all tokens. MTP layers of Compass models stand still.

--packing fills blocks of --max_length tokens, and a batch is all its blocks in one row, whose documents are kept apart
by their positions. On a GPU Compass attends to them by their lengths. Other models need a flash attention
(--attn_implementation) for that: without, a mask of the row's length squared is made, so keep batches small.
"""
_NO_TEMPLATE = (
    "Name a file with one by `chat_template_path`, or use a dataset whose 'prompt' and 'completion' are plain text."
)


@dataclass
class SftArguments(RunArguments, RowArguments):
    """Where the instructions come from, and what is done around the training.

    Parameters:
        compile_layers: Whether the layers are compiled; see [`otpo.cli.pretraining.compiling`].
    """

    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the model's layers, all by one graph. The first steps take a minute; later starts find "
            "what they need in torch's cache."
        },
    )


def make_parser() -> TrlParser:
    """The parser of [`SftArguments`], `SFTConfig`, `ModelConfig` and `DatasetMixtureConfig`, in this order."""
    return make_grouped_parser(
        "otpo sft",
        _DESCRIPTION,
        (SftArguments, SFTConfig, ModelConfig, DatasetMixtureConfig),
        [
            ("data and run", [RunArguments, RowArguments, SftArguments, ScriptArguments, DatasetMixtureConfig]),
            ("model and adapters", [ModelConfig]),
            ("instructions and loss (TRL)", [SFTConfig]),
            ("training (transformers)", SFTConfig.__mro__[1:-1]),
        ],
    )


def make_trainer(data: SftArguments, args: SFTConfig, model: ModelConfig, mixture: DatasetMixtureConfig) -> SFTTrainer:
    """Loads the instructions and the model."""
    from moe_backbone import CompassConfig

    from .launching.expert_parallel import model_options, trainer_class
    from .models.compass import attention_of_joined_rows, freeze_adapters_of_mtp, mtp_options
    from .pretraining.compiling import compile_for_run

    # What the options contradict each other in, before anything is loaded.
    origin = find_origin("model_name_or_path", require_model(model), model.model_revision)
    experts = read_request(data, args.model_init_kwargs)
    require_no_dropout(model)

    # The rows, and the chat template that conversations among them need.
    set_seed(args.seed)  # what is drawn before the trainer is made must agree across processes
    train, evaluation = load_rows(data, mixture, seed=args.seed, evaluate=args.do_eval, check=_checked)
    form = instruction_form(train, "training")
    processor = load_processor(origin, args.trust_remote_code)
    if is_conversational(next(iter(train)), form):
        template = _template(processor, args.chat_template_path)
        if form == "messages":
            args.assistant_only_loss = args.completion_only_loss is not False
        require_template(processor, template, args.assistant_only_loss)

    # The trainer's class: TRL's, with expert parallelism and a model card where they are asked for.
    config = load_config(origin, args.trust_remote_code)
    of_class = trainer_class(SFTTrainer, data, config)
    sources = tuple(source.path for source in mixture.datasets) or (data.dataset_name or "",)
    compass = isinstance(config, CompassConfig)
    of_class = with_model_card(of_class, Origin("otpo sft", origin.name, None, sources, compass, data.save_code))

    # The model, loaded by TRL, or by us where it has an adapter already.
    chosen = with_model_options(args.model_init_kwargs, model, origin.revision)
    kwargs = on_one_device(args, {**model_options(data), **mtp_options(config), **chosen})
    if args.padding_free or (args.packing and args.packing_strategy != "wrapped"):
        attention, told = attention_of_joined_rows(config, args, kwargs["attn_implementation"], kwargs["dtype"])
        kwargs["attn_implementation"] = attention
        data.notes |= {} if told is None else {"attention": told}
    quantization = get_quantization_config(model)
    args.model_init_kwargs = None if origin.adapted else kwargs
    with adapter_refusals(model):
        trainer = of_class(
            load_adapted(origin, args, kwargs, quantization) if origin.adapted else origin.name,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processor,
            quantization_config=None if origin.adapted else quantization,
            peft_config=adapter_config(model),
        )
    set_trainers_experts(experts, trainer, data)
    freeze_adapters_of_mtp(trainer.model)
    require_rows(train, trainer.train_dataset, args)
    if data.compile_layers:
        data.notes["compiled"] = compile_for_run(trainer, asked=True)
    return trainer


def _checked(rows: Dataset | IterableDataset, name: str, numbers: Sequence[int] | None) -> Dataset | IterableDataset:
    return check_instructions(rows, instruction_form(rows, name), name, numbers)


def require_template(processor: Any, template: str | None, assistant_only: bool) -> None:
    """Raises a `ValueError` when messages can't be written as text, or the answers in it can't be told apart.

    Args:
        processor: The tokenizer, or a processor that holds one.
        template: The chat template that is used; `"unknown"` for one that TRL is still to load.
        assistant_only: Whether the loss is of the assistant's turns alone.
    """
    if template is None:
        raise ValueError(f"The model's tokenizer has no chat template, which messages need. {_NO_TEMPLATE}")
    if not assistant_only or template == "unknown" or has_generation_markers(template):
        return
    own = processor.chat_template
    try:
        processor.chat_template = template
        get_training_chat_template(processor)
    except ValueError as error:
        raise ValueError(
            "The chat template does not mark the assistant's answers, and TRL knows no version of it that does. Put "
            "`{% generation %}` and `{% endgeneration %}` around the answer and its end token in a copy and name the "
            "file by `chat_template_path`, use a dataset with 'prompt' and 'completion', or set "
            "`completion_only_loss=False` to count all tokens."
        ) from error
    finally:
        processor.chat_template = own


def require_rows(loaded: Dataset | IterableDataset, prepared: Any, args: SFTConfig) -> None:
    """Warns of rows that truncation left nothing of to learn.

    Raises:
        ValueError: All are such rows.
    """
    if args.packing or not isinstance(loaded, Dataset) or not hasattr(prepared, "__len__"):
        return
    dropped = len(loaded) - len(prepared)
    cause = f"no token of an answer within `max_length={args.max_length}`"
    if not len(prepared):
        raise ValueError(f"All {len(loaded)} rows of the training dataset have {cause}. Raise `max_length`.")
    if dropped:
        logger.warning(f"{dropped} of {len(loaded)} rows of the training dataset are left out: {cause}.")


def describe(trainer: SFTTrainer, parsed: tuple[Any, ...]) -> dict[str, str]:
    """What really runs, line by line."""
    from .models.compass import describe_mtp

    args: SFTConfig = parsed[1]
    counted = "all tokens"
    if args.assistant_only_loss:
        counted = "the assistant's tokens"
    elif trainer.completion_only_loss:
        counted = "the completions' tokens"
    lines = {
        **describe_run(trainer, parsed[2].model_name_or_path),
        "loss": f"{args.loss_type} of {counted}, learning rate {args.learning_rate:g}",
        "blocks" if args.packing else "rows": f"{count_rows(trainer.train_dataset)} to train on, "
        f"{count_rows(trainer.eval_dataset)} to evaluate on, {rows_in_step(trainer)} in a step",
    }
    if args.packing:
        lines["packing"] = f"{args.packing_strategy}, blocks of up to {args.max_length} tokens"
    lines |= parsed[0].notes
    lines |= describe_sharing(trainer.accelerator)
    if trainer.aux_loss_enabled:
        part = " over each process's part of the rows" if "context" in lines else ""
        balance = f"load-balancing loss{part} weighed with {trainer.router_aux_loss_coef:g}, no z-loss"
        lines["experts"] = "; ".join(filter(None, [lines.get("experts"), balance]))
    return {**lines, **describe_mtp(trainer.model)}


def _template(processor: Any, path: str | None) -> str | None:
    """The chat template that TRL will use; `"unknown"` for that of another model."""
    if path is None:
        template = processor.chat_template
        return template["default"] if isinstance(template, dict) else template
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() and file.suffix in (".jinja", ".j2") else "unknown"


COMMAND = TrainingCommand("sft", make_parser, make_trainer, describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `otpo sft`; see [`otpo.cli.running.command.run`]."""
    return run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
