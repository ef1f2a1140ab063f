"""The documents of `otpo quantize`: any rows that `otpo pretrain` or `otpo sft` read, as token ids."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl import DatasetMixtureConfig

from moe_backbone.pretraining.documents import DocumentEncoder
from otpo.data.loading import RowArguments, load_rows

_COLUMNS = ("input_ids", "text", "messages", "prompt")
_ANSWERS = ("completion", "chosen")
_LENGTH = 2048


def longest_document(config: Any, max_length: int | None) -> int:
    """Tokens of a document at most: as many as are asked for, else 2048, and no more than the model has positions.

    Args:
        config: Of the model.
        max_length: Of the command line; None for the default.

    Raises:
        ValueError: The model has fewer positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return min(_LENGTH, positions or _LENGTH)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"`--max_length {max_length}`: the model has {positions} positions (`max_position_embeddings`), and was "
            f"taught none behind them. Set `--max_length {positions}` or less, or leave it out."
        )
    return max_length


def read_documents(options: Any, tokenizer: Any, vocab_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the documents to draw from, none of which dynamic scales need, and of held-out ones for the report.

    Args:
        options: Of the command.
        tokenizer: Of the model; None is enough for rows of token ids.
        vocab_size: Token ids must be below it.

    Raises:
        ValueError: The data can't be read, or a row holds no document.
    """
    data = RowArguments(
        dataset_name=options.dataset_name,
        dataset_config=options.dataset_config,
        dataset_train_split=options.dataset_train_split,
        dataset_test_split=options.dataset_test_split,
        max_train_rows=options.max_train_rows,
        max_eval_rows=options.max_eval_rows,
    )
    mixture = DatasetMixtureConfig(test_split_size=options.test_split_size)
    train, test = load_rows(data, mixture, seed=options.seed, evaluate=not options.skip_report)
    if options.input_scales == "dynamic":
        train = None
    name = str(options.dataset_name)
    return tuple(  # pyright: ignore[reportReturnType]
        [] if rows is None else encode(rows, name, tokenizer, vocab_size, options.text_column, options.max_length)
        for rows in (train, test)
    )


def encode(
    rows: Any, name: str, tokenizer: Any, vocab_size: int, column: str | None, max_length: int
) -> list[list[int]]:
    """Token ids of rows, cut at `max_length`; rows of a single token are left out, as in pretraining.

    Args:
        rows: A dataset.
        name: Of the dataset, for messages.
        tokenizer: Of the model, or None.
        vocab_size: Token ids must be below it.
        column: With the documents; None for the first of ours that is there.
        max_length: Tokens of a document at most.

    Raises:
        ValueError: A row holds no document, or there is no tokenizer or chat template for it.
    """
    found = column or next((known for known in _COLUMNS if known in rows.column_names), None)
    if found is None or found not in rows.column_names:
        wanted = "a column of documents" if column is None else f"a column {column!r}"
        raise ValueError(
            f"`--dataset_name {name}` has no {wanted.removeprefix('a ')}; it has {sorted(rows.column_names)}. Set "
            "`--text_column` to the one with the text."
        )
    if tokenizer is None and found != "input_ids":
        raise ValueError(f"`--dataset_name {name}` holds text, and the model has no tokenizer beside its weights.")
    if found in ("messages", "prompt") and column is None:
        rows = Dataset.from_dict({"text": [_written(row, found, name, tokenizer) for row in rows]})
        found = "text"
    encoder = DocumentEncoder(name, found, tokenizer, vocab_size)
    documents: list[list[int]] = []
    for start, chunk in _chunks(rows):
        documents += encoder(chunk, range(start, start + len(chunk[found])))["input_ids"]
    if not documents:
        raise ValueError(f"`--dataset_name {name}` has no document of two tokens or more.")
    return [list(document[:max_length]) for document in documents]


def _chunks(rows: Any, size: int = 256) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _written(row: Mapping[str, Any], column: str, name: str, tokenizer: Any) -> str:
    """A row of messages, of a prompt and its completion, or of a pair, as the text that a model reads."""
    answer = next((row[key] for key in _ANSWERS if row.get(key) is not None), "")
    whole = row[column]
    if isinstance(whole, str) and isinstance(answer, str):
        return whole + (answer if column == "prompt" else "")
    messages: Sequence[Any] = [*whole, *(answer if column == "prompt" and not isinstance(answer, str) else [])]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"`--dataset_name {name}` holds messages, and the model's tokenizer has no chat template to write them by."
        )
    return tokenizer.apply_chat_template(messages, tokenize=False)


def batches(documents: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Documents in their order, `size` of them a batch."""
    for start in range(0, len(documents), size):
        yield documents[start : start + size]
