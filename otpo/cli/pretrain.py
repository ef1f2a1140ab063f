"""`otpo pretrain`: pretraining of a Compass model, from a preset or on from a checkpoint, in one stage or several.

Also the module that `accelerate launch -m otpo.cli.pretrain` runs in each process.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser

from moe_backbone import PRESETS, CompassConfig, CompassForCausalLM, preset
from moe_backbone.counting import count_parameters
from moe_backbone.mixing import Mixture, Source, Stage, load_mixture, read_mixture
from moe_backbone.packing import pack_documents
from moe_backbone.pretraining import PretrainingConfig, PretrainingTrainer
from otpo.data import load_demo_corpus

from .command import REFUSALS, TrainingCommand, refuse, require_model, run
from .engine import count_rows, describe_run, rows_in_step
from .expert_parallel import model_options, trainer_class
from .loading import DEMO_CORPUS, RowArguments
from .model_card import Origin, with_model_card
from .options import RunArguments, make_grouped_parser, read_command_line
from .stages import plan_stages

_DESCRIPTION = """\
Pretrain a Compass Mixture-of-Experts model on packed documents.

  otpo pretrain --preset compass-tiny --tokenizer_name_or_path TOKENIZER --dataset_name otpo/demo-corpus \\
      --sequence_length 256 --max_steps 200 --output_dir runs/pretrain
  otpo pretrain --preset compass-small --tokenizer_name_or_path TOKENIZER --mixture MIXTURE.yaml --output_dir runs/all
  otpo pretrain --model_name_or_path runs/pretrain --dataset_name more.jsonl --max_steps 100 --output_dir runs/more
  otpo pretrain --config RECIPE.yaml --accelerate_config zero2 --num_processes 8

A mixture lists stages, each with its sources and their weights, its length and its learning rate; they run one after
the other, each in a folder of its own. --resume_from_checkpoint true goes on where a run was stopped.
"""
_VOCABULARY_MULTIPLE = 64
_STREAM_SHUFFLE_ROWS = 1_000
_DEMO_DOCUMENTS = 20_000


@dataclass
class PretrainArguments(RunArguments, RowArguments):
    """Which model is made, and of what it learns.

    Parameters:
        preset: Name of a preset, for a new model.
        config_overrides: Options of its configuration, `name=value,name=value`; also of a checkpoint's.
        tokenizer_name_or_path: Tokenizer, for a new model.
        experts_implementation: How the experts are computed.
        mixture: YAML file with stages, in place of `dataset_name`.
        stage: The one stage of the mixture to run.
        text_column: Column of the dataset with the text.
    """

    preset: str | None = field(
        default=None, metadata={"help": f"Make a new model: {', '.join(PRESETS)}. Its vocabulary is the tokenizer's."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Options of the model's configuration: name=value,name=value."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of a new model. Unset: the one of `model_name_or_path`."}
    )
    experts_implementation: str = field(
        default="grouped_mm", metadata={"help": "How experts are computed: grouped_mm, batched_mm or eager."}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "YAML file with stages and weighted sources, in place of `dataset_name`."}
    )
    stage: str | None = field(default=None, metadata={"help": "Run this stage of the mixture alone. Unset: all."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset with the text."})


def make_parser() -> TrlParser:
    """The parser of [`PretrainArguments`], [`PretrainingConfig`] and `ModelConfig`, in this order."""
    return make_grouped_parser(
        "otpo pretrain",
        _DESCRIPTION,
        (PretrainArguments, PretrainingConfig, ModelConfig),
        [
            ("pretraining (otpo)", [PretrainArguments, PretrainingConfig]),
            ("data and run", [RunArguments, RowArguments, ScriptArguments]),
            ("model", [ModelConfig]),
            ("training (transformers)", list(PretrainingConfig.__mro__[1:-1])),
        ],
    )


def make_trainer(data: PretrainArguments, args: PretrainingConfig, model: ModelConfig) -> PretrainingTrainer:
    """Makes or loads the model and packs the documents.

    Raises:
        ValueError: An option, a source or a configuration can't be used.
    """
    set_seed(args.seed)
    mixture = _mixture(data)
    stage = mixture.stage(data.stage) if data.stage else mixture.stages[0]
    tokenizer = _tokenizer(data, model)
    compass = make_model(data, args, model, tokenizer, stage)
    config = compass.config
    of_class = trainer_class(PretrainingTrainer, data, config)
    sources = tuple(dict.fromkeys(source.path for source in stage.sources))
    parent = model.model_name_or_path
    of_class = with_model_card(of_class, Origin("otpo pretrain", parent, data.preset, sources, True, data.save_code))
    train = _rows(stage.sources, tokenizer, config, args, streaming=mixture.streaming)
    test = None
    if args.do_eval or args.eval_strategy != "no":
        if not mixture.evaluation:
            raise ValueError("There is nothing to evaluate on. List sources under `evaluation` in the mixture.")
        test = _rows(mixture.evaluation, tokenizer, config, args, streaming=False)
    return of_class(compass, args, train, test, processing_class=tokenizer)


def make_model(
    data: PretrainArguments, args: PretrainingConfig, model: ModelConfig, tokenizer: Any, stage: Stage
) -> CompassForCausalLM:
    """A new model of the preset, or the checkpoint's, with the options that the stage and the command line change."""
    changes: dict[str, Any] = _parse_overrides(data.config_overrides)
    if stage.rope_parameters is not None:
        changes["rope_parameters"] = stage.rope_parameters
    options: Any = {"attn_implementation": model.attn_implementation or "sdpa", "dtype": model.dtype}
    if model.model_name_or_path is None:
        vocabulary = -(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        config = preset(data.preset or "", **{"vocab_size": vocabulary, **changes})
    else:
        config = CompassConfig.from_pretrained(require_model(model), **changes)
    config.max_position_embeddings = max(config.max_position_embeddings, args.sequence_length)
    for token in ("pad", "bos", "eos"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    spread = model_options(data)
    name = model.model_name_or_path
    if name is None and spread:  # transformers spreads experts as it loads a model
        name = f"{args.output_dir}/initial"
        with args.main_process_first(local=False):
            if args.process_index == 0:
                CompassForCausalLM._from_config(config, **options).save_pretrained(name)
    if name is None:
        compass: Any = CompassForCausalLM._from_config(config, **options)
    else:
        compass = CompassForCausalLM.from_pretrained(name, config=config, **options, **spread)
    compass.set_experts_implementation(data.experts_implementation)
    running = compass.config._experts_implementation
    if running != data.experts_implementation:
        raise ValueError(
            f"`experts_implementation={data.experts_implementation}` was asked for, but transformers runs {running}."
        )
    return compass


def describe(trainer: PretrainingTrainer, parsed: tuple[Any, ...]) -> dict[str, str]:
    """What really runs, line by line."""
    data, args, model = parsed
    config: Any = trainer.model.config  # pyright: ignore
    counts = count_parameters(config)
    rows = rows_in_step(trainer)
    lines = describe_run(trainer, model.model_name_or_path or data.preset)
    lines["experts"] = (
        f"{config.num_experts}, {config.num_experts_per_tok} a token, {config.num_shared_experts} shared, "
        f"{counts.active:,} parameters active, run by {config._experts_implementation}"
    )
    if data.stage:
        lines["stage"] = data.stage
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
        values = read_command_line(parser, argv).values
        stages = read_mixture(values["mixture"]).stages if values["mixture"] and not values["stage"] else []
        if len(stages) < 2:
            return run(COMMAND, argv)
        plan = plan_stages(stages, values["output_dir"], values["resume_from_checkpoint"])
    except REFUSALS as error:
        return refuse(parser.prog, error)
    for arguments, finished in plan:
        code = run(COMMAND, [*argv, *arguments])
        if code:
            return code
        finished.touch()
    return 0


def _mixture(data: PretrainArguments) -> Mixture:
    """The mixture that was named, or one stage and evaluation of the dataset that was named in its place."""
    if data.mixture and data.dataset_name:
        raise ValueError(
            f"Both `dataset_name={data.dataset_name}` and `mixture={data.mixture}` name the data. Remove one."
        )
    if data.mixture:
        mixture = read_mixture(data.mixture)
        return replace(mixture, streaming=mixture.streaming or data.dataset_streaming)
    if not data.dataset_name:
        raise ValueError(
            "No data is named. Set `dataset_name` to a file, a folder written by `save_to_disk`, a name on the Hub or "
            f"'{DEMO_CORPUS}', or `mixture` to a YAML file with stages."
        )

    def source(split: str, most: int | None) -> Source:
        return Source(
            path=data.dataset_name or "",
            config=data.dataset_config,
            split=split,
            text_column=data.text_column,
            max_documents=most,
        )

    train = source(data.dataset_train_split, data.max_train_rows)
    stage = Stage(name="all", steps=1, sequence_length=2, learning_rate=1.0, sources=[train])
    test = source(data.dataset_test_split, data.max_eval_rows)
    return Mixture(stages=[stage], evaluation=[test], streaming=data.dataset_streaming)


def _rows(
    sources: Sequence[Source], tokenizer: Any, config: CompassConfig, args: PretrainingConfig, *, streaming: bool
) -> Any:
    documents = load_mixture(
        sources,
        tokenizer,
        config.vocab_size,
        streaming=streaming,
        seed=args.seed,
        bundled={DEMO_CORPUS: _demo_corpus},
    )
    rows = pack_documents(documents, args.sequence_length)
    if isinstance(rows, Dataset):
        return rows
    return rows.shuffle(seed=args.seed, buffer_size=_STREAM_SHUFFLE_ROWS)  # best-fit packing sorts rows by length


def _demo_corpus(source: Source) -> Any:
    asked = source.config or str(_DEMO_DOCUMENTS)
    if not asked.isdecimal() or not int(asked):
        raise ValueError(f"its `config` is the number of documents to generate, at least 1; got {asked!r}")
    return load_demo_corpus(source.split, int(asked))


def _tokenizer(data: PretrainArguments, model: ModelConfig) -> Any:
    if model.model_name_or_path is None and data.preset is None:
        raise ValueError(
            f"No model is named. Set `preset` for a new one ({', '.join(PRESETS)}), or `model_name_or_path`."
        )
    name = data.tokenizer_name_or_path or model.model_name_or_path
    if name is None:
        raise ValueError(f"`preset={data.preset}` needs a tokenizer: set `tokenizer_name_or_path`.")
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name} has no end-of-text token. Set its `eos_token` and save it.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _parse_overrides(text: str | None) -> dict[str, Any]:
    """`name=value,name=value` as a mapping, values read as JSON.

    Raises:
        ValueError: It is of another form, or there is no such option.
    """
    changes = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, sign, value = (word.strip() for word in part.partition("="))
        if not sign or name not in CompassConfig.__dataclass_fields__:
            raise ValueError(
                f"`config_overrides={text}`: {part.strip()!r} is no `name=value` of an option of CompassConfig."
            )
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return changes


if __name__ == "__main__":
    sys.exit(main())
