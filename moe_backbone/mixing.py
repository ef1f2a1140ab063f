"""The mixed-training strategy as data: stages of pretraining, each a weighted mixture of sources.

Compass-v3 (arXiv 2509.09121) trains in four stages: general knowledge, e-commerce and South-East Asian languages,
reasoning at 8K, and long context to 128K in two phases. Its mixtures, token budgets and learning rates are not
published; `examples/mixtures/compass.yaml` has ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

Documents = Dataset | IterableDataset
_BUILDERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(kw_only=True)
class Source:
    """Documents from one place.

    Attributes:
        path: A .jsonl, .json, .jsonl.gz, .parquet or .txt file, a folder written by `save_to_disk`, or a name on the
            Hub.
        weight: Share of the stage's documents that are drawn from it, relative to the other sources' weights, > 0.
        split: Split to read.
        config: Configuration on the Hub.
        text_column: Column with the text. A source with `input_ids` is taken as tokenized.
        max_documents: Documents to use, the first ones; None for all.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    config: str | None = None
    text_column: str = "text"
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"Source {self.path}: `weight` must be above 0, got {self.weight}. Remove the source.")


@dataclass(kw_only=True)
class Stage:
    """A stretch of pretraining with its own data, length and learning rate.

    Attributes:
        name: Names its folder.
        steps: Steps of the optimizer.
        sequence_length: Tokens of a row.
        learning_rate: Peak learning rate.
        sources: What it is trained on.
        warmup_steps: Steps until the peak.
        lr_scheduler_type: A schedule of transformers; `cosine` falls to 0, `cosine_with_min_lr` not.
        rope_parameters: Rotary positions from this stage on, such as YaRN for a longer context; None for the model's.
        per_device_train_batch_size: Rows of a micro-batch from this stage on; None for the run's.
        gradient_accumulation_steps: Micro-batches of a step; None for the run's.
    """

    name: str
    steps: int
    sequence_length: int
    learning_rate: float
    sources: list[Source] = field(default_factory=list)
    warmup_steps: int = 0
    lr_scheduler_type: str = "cosine"
    rope_parameters: dict[str, Any] | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage {self.name}: `{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.sources:
            raise ValueError(f"Stage {self.name} has no `sources`. List at least one with its `path`.")


@dataclass(kw_only=True)
class Mixture:
    """The whole of a pretraining.

    Attributes:
        stages: What follows what.
        evaluation: Documents to evaluate on, all of them.
        streaming: Whether the stages' documents are read as they are needed.
    """

    stages: list[Stage]
    evaluation: list[Source] = field(default_factory=list)
    streaming: bool = False

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"`stage={name}`: the mixture has {[stage.name for stage in self.stages]}.")


def read_mixture(path: str) -> Mixture:
    """Reads a mixture from YAML.

    Raises:
        ValueError: The file is missing, a name in it is unknown or missing, or a value is out of range.
    """
    if not Path(path).is_file():
        raise ValueError(f"`mixture={path}`: there is no such file.")
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.get("stages"):
        raise ValueError(f"`mixture={path}`: a mixture is a YAML mapping with a list `stages`.")
    stages = [
        _make(Stage, {**stage, "sources": _sources(stage, "sources", path)}, path) for stage in content["stages"]
    ]
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"`mixture={path}`: two stages have the same `name` among {names}. Give each its own.")
    return _make(Mixture, {**content, "stages": stages, "evaluation": _sources(content, "evaluation", path)}, path)


def load_mixture(
    sources: Sequence[Source],
    tokenizer: Any,
    vocab_size: int,
    *,
    streaming: bool,
    seed: int,
    bundled: Mapping[str, Callable[[Source], Documents]] | None = None,
) -> Documents:
    """Documents of all sources, tokenized and drawn by weight until each source has been read once.

    A source that ends is read again until the last one has ended. Each document ends with the end-of-text token.

    Args:
        sources: Where the documents come from.
        tokenizer: Makes `input_ids` of them.
        vocab_size: Token ids must be below it.
        streaming: Whether documents are read as they are needed.
        seed: Of the draws.
        bundled: Sources that are known by name, and how to load them.

    Raises:
        ValueError: A source can't be read, or has no such column or split. An empty document or a token beyond the
            vocabulary is found when its row is read, which is later for streams.
    """
    loaded: list[Any] = [_tokenized(source, tokenizer, vocab_size, streaming, bundled or {}) for source in sources]
    if len(loaded) == 1:
        return loaded[0]
    total = sum(source.weight for source in sources)
    return interleave_datasets(
        loaded,
        probabilities=[source.weight / total for source in sources],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def load_source(source: Source, streaming: bool, bundled: Mapping[str, Callable[[Source], Documents]]) -> Documents:
    """The documents of a source as they are.

    Raises:
        ValueError: It can't be read.
    """
    path = Path(source.path)
    try:
        if source.path in bundled:
            documents = bundled[source.path](source)
            if streaming and isinstance(documents, Dataset):
                documents = documents.to_iterable_dataset()
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved: Any = load_from_disk(source.path)
            documents = saved[source.split] if (path / "dataset_dict.json").is_file() else saved
            documents = documents.to_iterable_dataset() if streaming else documents
        else:
            builder = next((kind for ending, kind in _BUILDERS.items() if source.path.endswith(ending)), None)
            if builder and not path.is_file():
                raise FileNotFoundError("there is no such file")
            where: dict[str, Any] = {"path": source.path, "name": source.config}
            if builder:
                where = {"path": builder, "data_files": {source.split: source.path}}
            documents: Any = load_dataset(**where, split=source.split, streaming=streaming)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = error.__cause__ or error  # `datasets` wraps what went wrong in a file
        raise ValueError(f"Source {source.path} (split {source.split}) can't be read: {reason}") from error
    if source.max_documents is not None:
        documents = documents.take(source.max_documents)
    return documents


def _tokenized(
    source: Source,
    tokenizer: Any,
    vocab_size: int,
    streaming: bool,
    bundled: Mapping[str, Callable[[Source], Documents]],
) -> Documents:
    documents = load_source(source, streaming, bundled)
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns:
        raise ValueError(f"Source {source.path} (split {source.split}) has no documents.")
    column = "input_ids" if "input_ids" in columns else source.text_column
    if column not in columns:
        raise ValueError(
            f"Source {source.path} has no column {column!r}; it has {sorted(columns)}. Set `text_column` to the one "
            "with the text."
        )
    encode = DocumentEncoder(source.path, column, tokenizer, vocab_size)
    return documents.map(encode, with_indices=True, remove_columns=columns, batched=True)


class DocumentEncoder:
    """Makes token ids of a source's documents and refuses what can't be trained on.

    Args:
        source: What the source is called in messages.
        column: `"input_ids"`, or the column with the text.
        tokenizer: Makes token ids of text.
        vocab_size: Token ids must be below it.
    """

    def __init__(self, source: str, column: str, tokenizer: Any, vocab_size: int):
        self.source = source
        self.column = column
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    def __call__(self, rows: dict[str, list[Any]], indices: Sequence[int]) -> dict[str, list[list[int]]]:
        """Token ids of some rows, each with the end-of-text token behind it.

        Args:
            rows: Rows by column.
            indices: Their places in the source.

        Raises:
            ValueError: A document is empty, or a token is beyond the vocabulary.
        """
        documents = rows[self.column]
        for index, document in zip(indices, documents, strict=True):
            if not document or (isinstance(document, str) and not document.strip()):
                raise ValueError(f"Row {index} of source {self.source} is an empty document. Remove such rows.")
        if self.column == "input_ids":
            return {"input_ids": self._checked(documents, indices)}
        end = [self.tokenizer.eos_token_id]
        ids = self.tokenizer(documents, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": self._checked([[*document, *end] for document in ids], indices)}

    def _checked(self, documents: list[list[int]], indices: Sequence[int]) -> list[list[int]]:
        for index, ids in zip(indices, documents, strict=True):
            if max(ids) >= self.vocab_size or min(ids) < 0:
                worst = max(ids) if max(ids) >= self.vocab_size else min(ids)
                raise ValueError(
                    f"Row {index} of source {self.source} has token {worst}, but the model's `vocab_size` is "
                    f"{self.vocab_size}. Use the tokenizer that the model was made for, or make the model larger."
                )
        return documents


def _sources(values: Mapping[str, Any], name: str, path: str) -> list[Source]:
    return [_make(Source, source, path) for source in values.get(name, [])]


def _make(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    known = [entry.name for entry in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"`mixture={path}`: a {kind.__name__.lower()} has no {unknown}; there are {known}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"`mixture={path}`: a {kind.__name__.lower()} is incomplete: {error}") from error
