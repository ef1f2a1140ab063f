"""The pairs that `otpo explain` is asked about: rows of a dataset, or one that is typed."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("prompt", "chosen", "rejected")


def load_rows(options: argparse.Namespace) -> tuple[list[int], "Dataset"]:
    """The numbers of the rows and the rows."""
    from trl import DatasetMixtureConfig

    from otpo.data.loading import DataArguments, load_pairs, unchecked
    from otpo.data.row_checks import check_pairs
    from otpo.data.row_numbers import remember_numbers

    source = DataArguments(
        dataset_name=options.dataset_name,
        dataset_config=options.dataset_config,
        dataset_train_split=options.dataset_train_split,
    )
    data: Any = load_pairs(source, DatasetMixtureConfig(), seed=0, evaluate=False, check=unchecked)[0]
    rows = [0] if options.rows is None else options.rows
    wrong = [row for row in rows if not 0 <= row < len(data)]
    if wrong:
        raise ValueError(
            f"`rows={wrong[0]}`: {options.dataset_name} has {len(data)} rows in its split "
            f"{options.dataset_train_split!r}. Name rows from 0 to {len(data) - 1}."
        )
    data = data.select(rows)
    remember_numbers(data, rows)
    check_pairs(data, "training", rows)
    for row, example in zip(rows, data, strict=True):
        for name in {"chosen", "rejected"} & set(example):
            if _is_blank(example[name]):
                raise ValueError(f"`rows={row}`: its {name} response is empty, so there are no tokens to weigh.")
    return rows, data


def _is_blank(response: Any) -> bool:
    if isinstance(response, list):
        return not response or _is_blank(response[-1].get("content", ""))
    return isinstance(response, str) and not response.strip()


def typed_pair(options: argparse.Namespace, processor: Any) -> "Dataset":
    """The pair of the command line, as messages where the model has a chat template."""
    from datasets import Dataset

    texts = {name: getattr(options, name) for name in TEXTS}
    if getattr(processor, "chat_template", None) is None:
        return Dataset.from_list([texts])
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list([{name: [{"role": roles[name], "content": text}] for name, text in texts.items()}])
