"""The options of `otpo pairs`, checked as far as they can be before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from otpo.cli.options.run_options import GroupedParser, make_plain_parser
from otpo.cli.options.writing import require_writable_file
from otpo.cli.running.identity import run_identity
from otpo.data.source_kinds import HELP, WHOLE
from otpo.pairs.judges import JUDGES, REWARD_MODEL

GENERATORS = ("transformers", "vllm")
DTYPES = ("auto", "bfloat16", "float16", "float32")
_DESCRIPTION = """\
Make preference pairs of a model's own answers. It answers each prompt several times, a judge scores the answers, and
the best and the worst become a pair; ties are dropped and counted. `otpo align` reads the file as it is.

  otpo pairs --model_name_or_path MODEL --dataset_name otpo/demo-instructions --judge checkers --output pairs.jsonl
  otpo pairs --model_name_or_path MODEL --dataset_name prompts.jsonl --judge my_judge.py:score --output pairs.jsonl
  otpo pairs --config RECIPE.yaml --judge reward_model --reward_model_name_or_path REWARDS
  otpo align --model_name_or_path MODEL --dataset_name pairs.jsonl

Prompts are the dataset's 'prompt', or its 'messages' without an answer at their end. A judge of yours is a function
that takes the prompt, the list of distinct answers and the row, and returns a score for each answer; naming it runs
its module. Where it raises or gives something else, the prompt is marked as failed and the run goes on.

Each answer has random numbers of its own, made from --seed, the prompt's row and the answer's number. The same command
writes the same file on the same machine; another --batch_size changes answers by rounding alone. A run that was killed
goes on when the same command is given again, from the ledger beside the file (FILE.ledger: all answers and scores),
and ends with the same file; where rows, the judge's file or a local model changed, it is refused. OTPO_TRACEBACK=1 in
the environment shows where an error comes from.
"""
_MAY_CHANGE = {"output", "batch_size", "use_cpu", "retry_failed"}
"""Options with which a run may go on changed, beside those of every command: where it runs, and how fast."""


@dataclass
class ModelOptions:
    """What answers.

    Parameters:
        model_name_or_path: Name on the Hub, or folder of a model or adapter.
        model_revision: Branch, tag or commit.
        dtype: Of its weights, one of [`DTYPES`].
        attn_implementation: Attention that transformers takes; None for its default.
        trust_remote_code: Whether code that comes with a model is run.
        use_cpu: Whether GPUs are left alone.
        generator: One of [`GENERATORS`].
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The model that answers: a name on the Hub, or a folder of a model or adapter."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": f"Type of its weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention that transformers takes."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a model."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave GPUs alone."})
    generator: str = field(
        default="transformers",
        metadata={
            "help": "What answers: transformers (its `generate`, on one device), or vllm where that is installed. The "
            "two don't draw the same answers."
        },
    )


@dataclass
class PromptOptions:
    """What is answered.

    Parameters:
        dataset_name: As in every command.
        dataset_config: As in every command.
        dataset_train_split: As in every command.
        max_train_rows: Prompts, the first of a shuffle with `seed`, >= 1. None: all.
    """

    dataset_name: str | None = field(default=None, metadata={"help": HELP["dataset_name"]})
    dataset_config: str | None = field(default=None, metadata={"help": HELP["dataset_config"]})
    dataset_train_split: str = field(default=WHOLE, metadata={"help": HELP["dataset_train_split"]})
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Prompts to answer: the first of a shuffle with `seed`. Unset: all."}
    )


@dataclass
class AnswerOptions:
    """How answers are drawn.

    Parameters:
        num_samples: Answers to each prompt, >= 2.
        temperature: Divides the logits, > 0.
        top_p: Mass of the likeliest tokens that are drawn from, in (0, 1].
        max_new_tokens: Tokens of an answer, >= 1.
        batch_size: Prompts answered at a time, >= 1.
        seed: Of the answers, and of the shuffle.
    """

    num_samples: int = field(default=8, metadata={"help": "Answers to each prompt, at least 2."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits, above 0."})
    top_p: float = field(default=1.0, metadata={"help": "Mass of the likeliest tokens that are drawn from, (0, 1]."})
    max_new_tokens: int = field(
        default=512,
        metadata={"help": "Tokens of an answer at most. One that is cut off may be rejected and is never chosen."},
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts answered at a time, each `num_samples` times."})
    seed: int = field(default=42, metadata={"help": "Seed of the answers, and of the shuffle of `max_train_rows`."})


@dataclass
class JudgeOptions:
    """Who scores the answers, and what makes a pair.

    Parameters:
        judge: Name of one of `otpo.pairs.judges.JUDGES`, `"reward_model"`, or a function of the user's.
        reward_model_name_or_path: The reward model of `judge="reward_model"`.
        min_score_chosen: The least score of a chosen answer; None for any.
        min_margin: By how much the scores of a pair differ at least, >= 0.
    """

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Who scores the answers: "
            + "; ".join(f"{name} ({judge.help})" for name, judge in JUDGES.items())
            + f"; {REWARD_MODEL}; or a function of yours as module:function or path/to/file.py:function."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"With `judge` {REWARD_MODEL}: a sequence classifier with one label, such as TRL trains."},
    )
    min_score_chosen: float | None = field(
        default=None, metadata={"help": "Leave out prompts whose best answer scores less."}
    )
    min_margin: float = field(
        default=0.0,
        metadata={"help": "Leave out prompts whose best and worst answer differ by less; equal scores always are."},
    )


@dataclass
class OutputOptions:
    """What is written.

    Parameters:
        output: File of the pairs.
        retry_failed: Whether prompts that failed in an earlier run of the same options are answered again.
    """

    output: str | None = field(default=None, metadata={"help": "File to write the pairs to, such as pairs.jsonl."})
    retry_failed: bool = field(
        default=False,
        metadata={
            "help": "Going on from a ledger, answer the prompts again that failed. With a judge whose file changed it "
            "is another run."
        },
    )


@dataclass
class PairsArguments(OutputOptions, JudgeOptions, AnswerOptions, PromptOptions, ModelOptions):
    """All options of `otpo pairs`."""


def make_parser() -> GroupedParser:
    """The parser of [`PairsArguments`]."""
    return make_plain_parser(
        "otpo pairs",
        _DESCRIPTION,
        (PairsArguments,),
        [
            ("model", [ModelOptions]),
            ("prompts", [PromptOptions]),
            ("answers", [AnswerOptions]),
            ("judge and pairs", [JudgeOptions]),
            ("output", [OutputOptions]),
        ],
    )


def check_options(options: PairsArguments) -> Path:
    """The file to write, after what the options alone tell was looked at.

    Raises:
        ValueError: An option is missing or can't be used; the message says what to set.
    """
    if options.output is None:
        raise ValueError("No file is named. Set `output` to where the pairs go, such as pairs.jsonl.")
    if not options.output.endswith((".jsonl", ".json")):
        raise ValueError(
            f"`output={options.output}` does not end as a file of JSON lines does, and `otpo align` goes by the "
            "ending. Name one that ends in .jsonl."
        )
    require_writable_file("output", options.output, "pairs.jsonl")
    if options.judge is None:
        raise ValueError(
            f"No judge is named. Set `judge` to one of {', '.join(JUDGES)}, {REWARD_MODEL}, or a function of yours as "
            "module:function or path/to/file.py:function."
        )
    rewards = options.reward_model_name_or_path
    if (options.judge == REWARD_MODEL) != (rewards is not None):
        remedy = "Name the model" if rewards is None else f"Set `judge` to {REWARD_MODEL}, or leave it out"
        raise ValueError(f"`judge={options.judge}` with `reward_model_name_or_path={rewards}`. {remedy}.")
    for name in ("batch_size", "max_train_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if options.seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {options.seed}.")
    for name, known in (("generator", GENERATORS), ("dtype", DTYPES)):
        value = getattr(options, name)
        if value not in known:
            raise ValueError(f"`{name}={value}` is not known. Set one of: {', '.join(known)}.")
    if options.generator == "vllm":
        if find_spec("vllm") is None:
            raise ValueError("`generator=vllm` needs the package vllm: `pip install vllm`, or leave `generator` out.")
        if options.use_cpu:
            raise ValueError("`generator=vllm` with `use_cpu=True`. Leave one of them out.")
    return Path(options.output)


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run what it is, as JSON values: the options that its pairs depend on.

    Args:
        values: Value of each option.
    """
    found = run_identity([PairsArguments], values)
    return {name: value for name, value in found.items() if name not in _MAY_CHANGE}
