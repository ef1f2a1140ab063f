"""The documents of `otpo pretrain`: a dataset's or a mixture's, in packed rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from moe_backbone import CompassConfig
from moe_backbone.pretraining.documents import Source, SplitError, Stage, load_mixture, read_mixture
from moe_backbone.pretraining.packing import pack_documents
from moe_backbone.pretraining.trainer import PretrainingConfig
from otpo.data import load_demo_corpus
from otpo.data.loading import DEMO, DEMO_CORPUS, DEMO_INSTRUCTIONS

from .options import PretrainArguments

_STREAM_SHUFFLE_ROWS = 1_000
_DEMO_DOCUMENTS = {"train": 20_000, "test": 500}


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
            "No data is named. Set `dataset_name` to a file, a folder written by `save_to_disk`, a name on the Hub or "
            f"'{DEMO_CORPUS}', or `mixture` to a YAML file with stages."
        )
    whole = Source(path=data.dataset_name, config=data.dataset_config, text_column=data.text_column, shuffle=True)
    evaluated = None if data.dataset_name == DEMO_CORPUS else data.dataset_config
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
    bundled = {DEMO_CORPUS: _demo_corpus, DEMO: _no_documents, DEMO_INSTRUCTIONS: _no_documents}
    try:
        documents = load_mixture(
            sources, tokenizer, config.vocab_size, streaming=streaming, seed=args.seed, bundled=bundled
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


def _demo_corpus(source: Source) -> Any:
    if source.split not in _DEMO_DOCUMENTS:
        raise SplitError(f"it has the split(s) {sorted(_DEMO_DOCUMENTS)}")
    asked = str(_DEMO_DOCUMENTS[source.split] if source.config is None else source.config)
    if not asked.isdecimal() or not int(asked):
        raise ValueError(f"its `config` is the number of documents to generate, at least 1; got {asked!r}")
    return load_demo_corpus(source.split, int(asked))


def _no_documents(source: Source) -> Any:
    raise ValueError(f"it holds no documents. `{DEMO_CORPUS}` does")
