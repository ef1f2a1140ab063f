"""Documents of a mixture: tokenized, and drawn by weight from sources that a reader reads."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets
from datasets.exceptions import DatasetsError
from transformers.utils import logging

from .mixture import Mixture, Source, Stage, read_mixture
from .sources import Documents, SplitError, read_source

__all__ = [
    "DocumentEncoder",
    "Mixture",
    "Source",
    "SplitError",
    "Stage",
    "load_mixture",
    "load_source",
    "read_mixture",
    "read_source",
]

logger = logging.get_logger(__name__)

Reader = Callable[[Source, bool], Documents]
"""Reads the split of a source, all of it, as a stream if asked for; a [`SplitError`] where there is no such split."""
_SHUFFLE_ROWS = 10_000


def load_mixture(
    sources: Sequence[Source],
    tokenizer: Any,
    vocab_size: int,
    *,
    streaming: bool,
    seed: int,
    bundled: Mapping[str, Callable[[Source], Documents]] | None = None,
    read: Reader = read_source,
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
        read: Reads all other sources.

    Raises:
        ValueError: A source can't be read, has no such column or split, or no document of two tokens. An empty
            document or a token beyond the vocabulary is found when its row is read, which is later for streams.
    """
    loaded: list[Any] = [
        _tokenized(source, load_source(source, streaming, bundled, seed, read), tokenizer, vocab_size)
        for source in sources
    ]
    if len(loaded) == 1:
        return loaded[0]
    total = sum(source.weight for source in sources)
    return interleave_datasets(
        loaded,
        probabilities=[source.weight / total for source in sources],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def load_source(
    source: Source,
    streaming: bool,
    bundled: Mapping[str, Callable[[Source], Documents]] | None = None,
    seed: int = 0,
    read: Reader = read_source,
) -> Documents:
    """The documents of a source as they are: the first ones, or the first of a shuffle by the seed, if not all.

    Raises:
        ValueError: It can't be read; a [`SplitError`] where its split is what is missing.
    """
    try:
        if source.path in (bundled or {}):
            documents = _make_bundled(source, streaming, bundled or {})
        else:
            documents = read(source, streaming)
    except (OSError, ValueError, DatasetsError) as error:
        # `datasets` wraps what went wrong in a file.
        reason = error if isinstance(error, SplitError) else error.__cause__ or error
        kind = SplitError if isinstance(error, SplitError) else ValueError
        raise kind(f"Source {source.path} (split {source.split}) can't be read: {reason}") from error
    if source.shuffle and source.max_documents is not None:
        options: Any = {} if isinstance(documents, Dataset) else {"buffer_size": _SHUFFLE_ROWS}
        documents = documents.shuffle(seed=seed, **options)
    if source.max_documents is None:
        return documents
    if isinstance(documents, Dataset):
        return documents.select(range(min(source.max_documents, len(documents))))
    return documents.take(source.max_documents)


def _make_bundled(source: Source, streaming: bool, bundled: Mapping[str, Callable[[Source], Documents]]) -> Documents:
    path = Path(source.path)
    if path.exists():
        raise ValueError(f"it is bundled, and there is a local {path} too. Name that one ./{path}")
    documents = bundled[source.path](source)
    return documents.to_iterable_dataset() if streaming and isinstance(documents, Dataset) else documents


def _tokenized(source: Source, documents: Documents, tokenizer: Any, vocab_size: int) -> Documents:
    where = f"Source {source.path} (split {source.split})"
    if not isinstance(documents, Dataset) or documents.format["type"] != "custom":  # which may make the documents
        documents = documents.with_format(None)  # a dataset is saved with its format, such as torch
    try:
        columns = documents.column_names or list(next(iter(documents), {}))
    except (OSError, ValueError, DatasetsError) as error:  # of a stream, which is read here for the first time
        raise ValueError(f"{where} can't be read: {error.__cause__ or error}") from error
    if not columns:
        raise ValueError(f"{where} has no documents.")
    column = source.text_column or ("input_ids" if "input_ids" in columns else "text")
    if column not in columns:
        raise ValueError(
            f"Source {source.path} has no column {column!r}; it has {sorted(columns)}. Set `text_column` to the one "
            "with the text."
        )
    encode = DocumentEncoder(source.path, column, tokenizer, vocab_size)
    encoded: Any = documents.map(encode, with_indices=True, remove_columns=columns, batched=True)
    if next(iter(encoded), None) is None:
        raise ValueError(f"{where} has no document of two tokens or more, so there is nothing to predict in it.")
    if isinstance(documents, Dataset) and len(encoded) < len(documents):
        dropped = len(documents) - len(encoded)
        logger.warning(f"{where}: {dropped} of {len(documents)} documents are left out, of one token each.")
    return encoded


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
        """Token ids of some rows, each with the end-of-text token behind it, less those with nothing to predict.

        A document of a single token has no next one: it is left out.

        Args:
            rows: Rows by column.
            indices: Their places in the source.

        Raises:
            ValueError: A document is empty or no text, or a token is no whole number or beyond the vocabulary.
        """
        documents = rows[self.column]
        for index, document in zip(indices, documents, strict=True):
            if not document or (isinstance(document, str) and not document.strip()):
                raise ValueError(f"Row {index} of source {self.source} is an empty document. Remove such rows.")
            if not isinstance(document, list if self.column == "input_ids" else str):
                wanted = "a list of token ids" if self.column == "input_ids" else "text"
                raise ValueError(
                    f"Row {index} of source {self.source} has {document!r:.60} in column {self.column!r}, which must "
                    f"hold {wanted}. Set `text_column` to the column with the text."
                )
        if self.column == "input_ids":
            return self._checked(documents, indices)
        end = [self.tokenizer.eos_token_id]
        ids = self.tokenizer(documents, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return self._checked([[*document, *end] for document in ids], indices)

    def _checked(self, documents: list[list[int]], indices: Sequence[int]) -> dict[str, list[list[int]]]:
        for index, ids in zip(indices, documents, strict=True):
            for token in () if set(map(type, ids)) == {int} else ids:
                if type(token) is not int:
                    raise ValueError(
                        f"Row {index} of source {self.source} has {token!r:.60} among its `input_ids`, which must be "
                        "whole numbers. Remove such rows, or set `text_column` to the column with the text."
                    )
            if max(ids) >= self.vocab_size or min(ids) < 0:
                worst = max(ids) if max(ids) >= self.vocab_size else min(ids)
                raise ValueError(
                    f"Row {index} of source {self.source} has token {worst}, but the model's `vocab_size` is "
                    f"{self.vocab_size}. Use the tokenizer that the model was made for, or make the model larger."
                )
        return {"input_ids": [ids for ids in documents if len(ids) > 1]}
