"""Digests of what options name: rows, a judge's code, models. The same name may stand for something else tomorrow."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from otpo.cli.models.loading import find_origin
from otpo.pairs.judges import JUDGES, REWARD_MODEL
from otpo.version import __version__

CONTENTS = {
    "prompts": "the rows of `dataset_name`, all columns",
    "weights": "the weights of the local models, an adapter's base among them",
    "model_files": "the configurations, tokenizers, chat templates, generation options and code of the local models",
    "judge_code": "the file of the judge's function, or the version of otpo where the judge is ours",
}
"""Entries of a run's identity that are digests, each with what it is of."""
_MEGABYTE = 1 << 20
_ROWS = 1000
_WEIGHTS = (".safetensors", ".bin")
# What loads with the weights; not reports, model cards or a trainer's state, which may change beside them.
_FILES = ("config.json", "configuration*.json", "generation_config.json", "adapter_config.json", "*.index.json")
_FILES += ("*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "tekken.json")
_FILES += ("*.model", "*.spm", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*.py")
_FILES += ("*processor_config.json",)


def rows_digest(rows: Any, numbers: Sequence[int]) -> str:
    """Of whole rows and their numbers: a judge may read any column, and the template `tools` and its own options.

    Values are taken as they are stored, so that pictures are not decoded.

    Args:
        rows: A `datasets.Dataset`.
        numbers: Number of each row.
    """
    digest = hashlib.sha256()
    begin = 0
    for table in rows.with_format("arrow").iter(batch_size=_ROWS):
        for number, row in zip(numbers[begin : begin + _ROWS], table.to_pylist(), strict=True):
            digest.update(_as_json([number, row]))
        begin += _ROWS
    return _short(digest)


def _as_json(value: Any) -> bytes:
    """The one form of a value; what JSON lacks (bytes, dates, decimals) goes by its type and text."""
    return json.dumps(value, default=lambda other: f"{type(other).__name__} {other}").encode() + b"\n"


def judge_digest(name: str | None) -> str | None:
    """Of the file that a user's judge is in, or the version of otpo for its own judges; None for what can't be found.

    What that file imports is not looked at.

    Args:
        name: As [`otpo.pairs.judges.load_judge`] takes it.

    Raises:
        ValueError: It names a file that does not exist.
    """
    if name in JUDGES or name == REWARD_MODEL:
        return f"otpo {__version__}"
    home = str(name).rpartition(":")[0]
    if not home:
        return None  # `load_judge` says what can be named
    file = Path(home) if home.endswith(".py") else _file_of(home)
    if file is None:
        return None
    if not file.is_file():
        raise ValueError(f"`judge={name}`: there is no file {home}.")
    return _short(hashlib.sha256(file.read_bytes()))


def _file_of(module: str) -> Path | None:
    """The file of a module that can be imported; naming one in its package imports the package."""
    try:
        spec = find_spec(module)
    except Exception:  # whatever a user's package raises, `load_judge` tells
        return None
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    return file if file is not None and file.is_file() else None


def weights_digest(folders: Sequence[Path]) -> str:
    """Of each file of weights its name, its size and the first and last megabyte: no read of a large model."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*")):
            if file.suffix in _WEIGHTS:
                size = file.stat().st_size
                with file.open("rb") as content:
                    digest.update(f"{file.name} {size}".encode() + content.read(_MEGABYTE))
                    content.seek(max(0, size - _MEGABYTE))
                    digest.update(content.read())
    return _short(digest)


def model_files_digest(folders: Sequence[Path]) -> str:
    """Of the files beside weights that say what the model is and what its tokens are: their names and bytes."""
    digest = hashlib.sha256()
    for folder in folders:
        found = {file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()}
        for file in sorted(found - {file for file in found if file.suffix in _WEIGHTS}):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return _short(digest)


def local_folders(**named: str | None) -> list[Path]:
    """The folders of models that options name, each adapter's followed by its base's; models of the Hub have none.

    Models of the Hub are told by their name and revision.

    Args:
        named: The model's name by the option's.

    Raises:
        ValueError: There is no such folder, or an adapter's base is not told or not there.
    """
    return [folder for option, name in named.items() if name is not None for folder in _folders(option, name)]


def model_digest(option: str, name: str | None) -> str:
    """Of a local model's weights and files, its base's among them; of none, for a model of the Hub, always the same.

    Args:
        option: That names the model, for messages.
        name: Folder, or name on the Hub.

    Raises:
        ValueError: See [`local_folders`].
    """
    folders = local_folders(**{option: name})
    return f"{weights_digest(folders)} {model_files_digest(folders)}"


def _folders(option: str, name: str) -> Iterator[Path]:
    if Path(name).is_dir() or name.startswith(("/", ".", "~")):
        origin = find_origin(option, name)
        yield Path(name)
        if origin.adapted and Path(origin.base).is_dir():
            yield Path(origin.base)


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]
