"""The options of `otpo pretrain` that are neither transformers' nor every command's, and which exclude each other."""

import argparse
from dataclasses import dataclass, field
from typing import ClassVar

from moe_backbone import PRESETS
from otpo.cli.options.run_options import Given, RunArguments
from otpo.data.loading import RowArguments

_IN_A_SOURCE = {
    "dataset_config": "config",
    "dataset_train_split": "split",
    "dataset_test_split": "split",
    "text_column": "text_column",
    "max_train_rows": "max_documents",
    "max_eval_rows": "max_documents",
}
"""Options that go with `dataset_name`, and what a mixture's source has in their place."""


@dataclass
class PretrainArguments(RunArguments, RowArguments):
    """Which model is made, and of what it learns.

    The rows of [`RowArguments`] are documents here, before they are packed, and a mixture's `streaming` holds where
    `dataset_streaming` is not set.

    Parameters:
        preset: Name of a preset, for a new model.
        config_overrides: Options of its configuration, `name=value,name=value`; also of a checkpoint's.
        tokenizer_name_or_path: Tokenizer, for a new model.
        compile_layers: Whether the layers are compiled; see [`otpo.cli.pretraining.compiling`].
        mixture: YAML file with stages, in place of `dataset_name`.
        stage: The one stage of the mixture to run.
        text_column: Column of the dataset with the text, or `input_ids`.
        previous_stage: Folder of the model that the stage before has left, for a stage among several. The command sets
            it itself.
    """

    preset: str | None = field(
        default=None, metadata={"help": f"Make a new model: {', '.join(PRESETS)}. Its vocabulary is the tokenizer's."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Options of the model's configuration, also of a checkpoint's: name=value,name=value, with values "
            "as in JSON."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer of a new model. Unset: the one of `model_name_or_path`."}
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile the model's layers, all by one graph. The first steps take a minute; later starts find "
            "what they need in torch's cache. Unset: on a GPU."
        },
    )
    mixture: str | None = field(
        default=None, metadata={"help": "YAML file with stages and weighted sources, in place of `dataset_name`."}
    )
    stage: str | None = field(default=None, metadata={"help": "Run this stage of the mixture alone. Unset: all."})
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of the dataset with the text. Unset: `input_ids` where there is one, else `text`."},
    )
    previous_stage: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})


@dataclass
class ModelArguments:
    """The checkpoint to go on from, and how a model is made.

    Parameters:
        model_name_or_path: A Compass model's folder or its name on the Hub.
        model_revision: Its branch, tag or commit on the Hub.
        dtype: Type of the weights; `auto` is a checkpoint's own. None lets
            [`choose_dtype`](otpo.cli.pretraining.weights.choose_dtype) choose.
        attn_implementation: How attention is computed.
    """

    FROM_CHECKPOINT: ClassVar[frozenset[str]] = frozenset({"dtype"})

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on from this checkpoint of a Compass model, in place of `preset`."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Its branch, tag or commit on the Hub, of the tokenizer too. Unset: main."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights; `auto` is the checkpoint's. AdamW trains bfloat16 weights by float32 "
            "masters, half of each in the optimizer; routers stay float32. float16 only where DeepSpeed, or FSDP "
            "under mixed precision, keeps float32 copies. Unset: bfloat16 by AdamW on one GPU under bf16 "
            "without an engine, of a new model or a checkpoint in bfloat16; else float32; a resumed run's own.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "How attention is computed: sdpa, eager, one of the flash attentions, or torch_varlen, which is "
            "torch's own kernel for packed rows. `auto` is torch_varlen on a GPU in half precision, else sdpa."
        },
    )


def check_options(given: Given) -> None:
    """Raises a `ValueError` for options of which one makes the other mean nothing."""
    values = given.values
    if values["mixture"]:
        if values["dataset_name"]:
            raise ValueError(
                f"Both `dataset_name={values['dataset_name']}` and `mixture={values['mixture']}` name the data. "
                "Remove one of them."
            )
        for option, name in _IN_A_SOURCE.items():
            if option in given.said and values[option] is not None:
                raise ValueError(
                    f"`{option}={values[option]}` goes with `dataset_name`. Of a mixture set `{name}` of its sources."
                )
    elif values["stage"]:
        raise ValueError(f"`stage={values['stage']}` names a stage of a mixture. Set `mixture`, or leave it out.")
    new, named = values["preset"], values["model_name_or_path"]
    if new and named:
        raise ValueError(
            f"Both `preset={new}` and `model_name_or_path={named}` name the model. Remove `preset` to go on from the "
            "checkpoint, or `model_name_or_path` for a new model."
        )
    if not named:
        if values["model_revision"]:
            raise ValueError(
                f"`model_revision={values['model_revision']}` goes with `model_name_or_path`. Leave it out."
            )
        if values["dtype"] == "auto":
            raise ValueError("`dtype=auto` is the type of a checkpoint's weights. Name one for a new model.")
