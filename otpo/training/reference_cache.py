"""The precomputed log-probabilities of the reference: a row of numbers for each response, and the key they belong to.

Shapes: B pairs, N rows of a dataset, W width of padded rows.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, config
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from otpo.data.token_table import ROWS_AT_ONCE, TOKEN_COLUMNS, blocks
from otpo.plain_model import has_adapter
from otpo.trl_seam import REFERENCE_COLUMNS, TOKEN_VALUES, implementations
from otpo.version import __version__
from otpo.weighting.token_values import TokenValues

KEY_COLUMN = "ref_logps_key"
"""The key of [`reference_key`] that a row's numbers were made under."""

# Of a configuration: where it lies and who wrote it, which say nothing about what the model computes.
_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "base_model_name_or_path", "inference_mode", "auto_map"}


def reference_key(dataset: Dataset, model: Any, parameters: str, *settings: Any) -> int:
    """What the log-probabilities of a dataset's tokens depend on, as a number of 63 bits.

    Args:
        dataset: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        model: The reference: a transformers model, or a PEFT model around it.
        parameters: A digest of its parameters.
        *settings: What else decides which tokens are scored and how they are computed.
    """
    digest = hashlib.blake2b(b"otpo: reference log-probabilities per token", digest_size=8)
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    for part in (__version__, libraries, describe_model(model), parameters, settings):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for lists in blocks(dataset, TOKEN_COLUMNS):
        for column in lists.values():
            digest.update(column.lengths.tobytes())
            digest.update(np.ascontiguousarray(column.values).tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def describe_model(model: Any) -> dict[str, Any]:
    """What a model computes with beside its parameters: modules, configuration, adapters, implementations, dtypes."""
    adapters = model.peft_config if has_adapter(model) else {}
    configs = [model.config, model.config.get_text_config()]
    return {
        "modules": repr(model),
        "config": _without_places(model.config.to_dict()),
        "attention": [implementations(each)[0] for each in configs],
        "experts": [implementations(each)[1] for each in configs],
        "adapters": {name: _without_places(adapter.to_dict()) for name, adapter in adapters.items()},
        "active_adapters": list(model.active_adapters) if adapters else [],
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }


def stored_under(dataset: Dataset, key: int, name: str) -> bool:
    """Whether a dataset brings precomputed rows of that key along.

    Raises:
        ValueError: It has such columns, made under another key or by somebody else.
    """
    brought = [column for column in (*REFERENCE_COLUMNS, KEY_COLUMN) if column in dataset.column_names]
    if not brought:
        return False
    if len(brought) == len(REFERENCE_COLUMNS) + 1 and dataset.unique(KEY_COLUMN) == [key]:
        return True
    whose = "another model, other rows or another truncation" if KEY_COLUMN in brought else "another program"
    raise ValueError(
        f"The {name} dataset has the columns {brought}, precomputed by {whose}. Remove them with "
        f"`dataset.remove_columns({brought})`; `precompute_ref_log_probs=True` makes them anew."
    )


def without_stored(dataset: Any) -> Any:
    """A dataset or stream without precomputed columns, which are not used where they are not asked for."""
    brought = [column for column in (*REFERENCE_COLUMNS, KEY_COLUMN) if column in (dataset.column_names or ())]
    return dataset.remove_columns(brought) if brought else dataset


def cache_file(dataset: Dataset, key: int) -> Path:
    """Where the rows of a dataset are kept: beside its own files.

    `datasets` gives a dataset that lives in memory a folder of its own in each process, where no other process looks;
    such rows lie in a folder of ours.
    """
    if dataset.cache_files:
        return Path(dataset.cache_files[0]["filename"]).parent / f"cache-{key:016x}.arrow"
    folder = Path(config.HF_DATASETS_CACHE) / "otpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"cache-{key:016x}.arrow"


def write_rows(path: Path, key: int, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes the rows of a dataset; a run that is killed while it writes leaves no file of that name.

    Args:
        path: The file, see [`cache_file`].
        key: See [`reference_key`].
        batches: Padded rows `(2B, W)`, chosen responses first, and how many of each are tokens `(2B,)`.
    """
    # Lists, each as long as its completion: one long completion must not widen all rows.
    kind = pa.list_(pa.float32())
    schema = pa.schema([*((name, kind) for name in REFERENCE_COLUMNS), (KEY_COLUMN, pa.int64())])
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for rows, counts in batches:
            sides = [_lists(*side) for side in zip(rows.chunk(2), counts.chunk(2), strict=True)]
            table = pa.table([*sides, pa.array([key] * len(sides[0]), pa.int64())], schema)
            writer.write_table(table, max_chunksize=ROWS_AT_ONCE)
    unfinished.replace(path)


class StoredRowsCollator:
    """A data collator that also takes stored rows of numbers of tokens, which are lists, and pads them.

    Args:
        collator: Makes everything else of a batch.
        values: What the rows hold beside the reference's log-probabilities.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], values: Sequence[TokenValues] = ()
    ) -> None:
        self.collator = collator
        self.values = {kind.name: kind.columns for kind in values}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, with what the examples have of stored rows.

        That is `ref_chosen_logps` and `ref_rejected_logps`, `(B, W)`, and a dictionary `token_values` of numbers by
        name, `(2B, W)`, whose rows are the chosen responses, then the rejected ones, as the batch's own are.
        """
        columns = {*REFERENCE_COLUMNS, *(column for pair in self.values.values() for column in pair)}
        stored = [name for name in examples[0] if name in columns]
        batch = self.collator(
            [{name: example[name] for name in example if name not in stored} for example in examples]
        )

        def rows(pair: tuple[str, str]) -> Tensor:
            lists = [torch.tensor(example[name], dtype=torch.float32) for name in pair for example in examples]
            return pad_sequence(lists, batch_first=True)

        if set(REFERENCE_COLUMNS) <= set(stored):
            batch.update(zip(REFERENCE_COLUMNS, rows(REFERENCE_COLUMNS).chunk(2), strict=True))
        values = {name: rows(pair) for name, pair in self.values.items() if set(pair) <= set(stored)}
        if values:
            batch[TOKEN_VALUES] = values
        return batch


def _lists(rows: Tensor, counts: Tensor) -> pa.ListArray:
    offsets = np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.int32)
    there = torch.arange(rows.size(1)) < counts[:, None]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows[there].numpy(), pa.float32()))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(entry) for name, entry in value.items() if name not in _NOT_OF_THE_MODEL}
    if isinstance(value, set | frozenset):  # whose order is another one in each process
        return sorted(map(str, value))
    return [_without_places(entry) for entry in value] if isinstance(value, list | tuple) else value
