"""The documents of `otpo pretrain`: a dataset's or a mixture's, in packed rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from moe_backbone import CompassConfig
from moe_backbone.pretraining.documents import Source, SplitError, Stage, load_mixture, read_mixture
from moe_backbone.pretraining.packing import pack_documents
from moe_backbone.pretraining.trainer import PretrainingConfig
from otpo.data import reader
from otpo.data.files import SourceError
from otpo.data.reader import read_splits, select_split
from otpo.data.source_kinds import BUNDLED, DEMO, DEMO_CORPUS, DEMO_INSTRUCTIONS, KINDS

from .options import PretrainArguments

_STREAM_SHUFFLE_ROWS = 1_000


def find_sources(data: PretrainArguments) -> tuple[list[Source], list[Source], Stage | None]:
    """What to train on and what to evaluate on, and the stage of a mixture.

    Raises:
        ValueError: No data is named, or the mixture can't be read or has no such stage.
    """
    if data.mixture:
        mixture = read_mixture(data.mixture)
        stage = mixture.stage(data.stage) if data.stage else mixture.stages[0]
        return stage.sources, mixture.evaluation, stage
    if not data.dataset_name:
        raise ValueError(
            "No data is named. Set `dataset_name` to a name on the Hub, a folder written by `save_to_disk`, a local "
            f"file ({KINDS}) or '{DEMO_CORPUS}', or `mixture` to a YAML file with stages."
        )
    whole = Source(path=data.dataset_name, config=data.dataset_config, text_column=data.text_column, shuffle=True)
    evaluated = None if data.dataset_name in BUNDLED else data.dataset_config
    train = replace(whole, split=data.dataset_train_split, max_documents=data.max_train_rows)
    test = replace(whole, split=data.dataset_test_split, max_documents=data.max_eval_rows, config=evaluated)
    return [train], [test], None


def load_rows(
    sources: Sequence[Source],
    option: str | None,
    tokenizer: Any,
    config: CompassConfig,
    args: PretrainingConfig,
    *,
    streaming: bool,
) -> Any:
    """Packed rows of the documents of some sources.

    Args:
        sources: Where the documents are.
        option: The option that has named their split; None for those of a mixture.
        tokenizer: Of the model.
        config: The model's.
        args: Row length and seed.
        streaming: Whether rows are read as they are needed.

    Raises:
        ValueError: A source can't be read.
    """
    try:
        documents = load_mixture(
            sources, tokenizer, config.vocab_size, streaming=streaming, seed=args.seed, read=read_documents
        )
    except SplitError as error:
        text = str(error).rstrip(".")
        if option is None:
            raise ValueError(f"{text}. Set the `split` of this source.") from error
        remedy = f"Set `{option}`"
        if option == "dataset_test_split":
            remedy += ", name a held-out file under `evaluation` in a mixture, or leave evaluation out"
        raise ValueError(f"`{option}`: {text}. {remedy}.") from error
    rows = pack_documents(documents, args.sequence_length)
    if isinstance(rows, Dataset):
        return rows
    return rows.shuffle(seed=args.seed, buffer_size=_STREAM_SHUFFLE_ROWS)  # best-fit packing sorts rows by length


def read_documents(source: Source, streaming: bool) -> Any:
    """A mixture's source by otpo's reader, which all commands share; see [`otpo.data.reader`].

    Raises:
        SplitError: It has no such split.
        ValueError: It can't be read, or is a bundled set that holds no documents.
    """
    if source.path in (DEMO, DEMO_INSTRUCTIONS):
        raise ValueError(f"it holds no documents. `{DEMO_CORPUS}` does")
    try:
        splits = read_splits(source.path, config=source.config, streaming=streaming, config_option="config")
        return select_split(splits, source.split)
    except reader.SplitError as error:
        raise SplitError(error.problem) from None
    except SourceError as error:
        raise ValueError(error.problem) from None
