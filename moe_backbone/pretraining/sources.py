"""The plain reader of a mixture's sources: what `datasets` reads by a file's ending, a saved folder, a Hub name.

[`moe_backbone.pretraining.documents.load_mixture`] takes any other reader in its place. `otpo pretrain` hands in the
one of `otpo`, since neither library imports the other: it reads the same sources, tells more of a broken file, and
takes all columns of a CSV file as text, while numbers and missing values stay such here.
"""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .mixture import WHOLE, Source

Documents = Dataset | IterableDataset
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class SplitError(ValueError):
    """A source has no such split."""


def read_source(source: Source, streaming: bool) -> Documents:
    """The documents of a source's split, all of them.

    Raises:
        SplitError: It has no such split.
        ValueError: It is of no kind that is read here, or has no configurations where one is named.
        OSError: There is no such file, or no such name on the Hub.
        datasets.exceptions.DatasetsError: Its content can't be read.
    """
    path = Path(source.path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _refuse_config(source, "a saved dataset")
        saved = load_from_disk(source.path)
        tables = saved if isinstance(saved, DatasetDict) else {WHOLE: saved}
        if source.split not in tables:
            raise SplitError(f"it has the split(s) {sorted(map(str, tables))}")
        return tables[source.split].to_iterable_dataset() if streaming else tables[source.split]
    name = Path(source.path.lower())
    text = name.with_suffix("") if name.suffix in _COMPRESSED else name
    known = _BUILDERS.get(text.suffix)
    builder = None if known == "parquet" and name != text else known  # parquet compresses by itself
    if path.is_file() or (known and not path.is_dir()):
        if builder is None:
            raise ValueError(
                f"it is of no kind that is read here: {', '.join(_BUILDERS)}, or a text file with "
                f"{', '.join(_COMPRESSED)} behind its ending"
            )
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        _refuse_config(source, "a file")
        return _load(builder, source.split, streaming, data_files={WHOLE: source.path})
    return _load(source.path, source.split, streaming, name=None if source.config is None else str(source.config))


def _load(path: str, split: str, streaming: bool, **options: object) -> Documents:
    try:
        return load_dataset(path, split=split, streaming=streaming, **options)  # pyright: ignore
    except ValueError as error:
        if str(error).startswith(("Unknown split", "Bad split")):
            raise SplitError(str(error)) from error
        raise


def _refuse_config(source: Source, kind: str) -> None:
    if source.config is not None:
        raise ValueError(f"{kind} has no configurations, and `config` is {source.config!r}. Leave it out.")
