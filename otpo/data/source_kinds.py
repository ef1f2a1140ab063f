"""What data is read from: kinds of files, the names of the sets that come with otpo, and how `--help` says so.

Nothing heavy is imported here, since `--help` needs these words before anything else.
"""

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
"""Endings of files that are read, and the builder of `datasets` that reads them. Each line of a .txt file is a row."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Endings that may follow those of text files, and what `fsspec` calls them."""

DEMO = "otpo/demo"
DEMO_INSTRUCTIONS = "otpo/demo-instructions"
DEMO_CORPUS = "otpo/demo-corpus"
BUNDLED = {DEMO: "pairs", DEMO_INSTRUCTIONS: "instructions", DEMO_CORPUS: "documents"}
"""Names of the sets that come with otpo, and what their rows are."""

WHOLE = "train"
"""The split of what has no splits: a file, and a folder of a single table."""

KINDS = f"{', '.join(BUILDERS)}, or a text file with {', '.join(COMPRESSIONS)} behind its ending"
_SOURCES = (
    f"a name on the Hub; a folder written by `save_to_disk`; a {', '.join(BUILDERS)} file, the text files compressed "
    f"({', '.join(COMPRESSIONS)}) or not; or what comes with otpo: "
    + ", ".join(f"'{name}' ({rows})" for name, rows in BUNDLED.items())
)
HELP = {
    "dataset_name": f"The data: {_SOURCES}.",
    "dataset_config": "Configuration of a dataset on the Hub; of what comes with otpo, the number of rows of the "
    "split that rows are taken from, while a split to evaluate on is whole.",
    "dataset_train_split": f"Split to take rows from, or a part of it such as '{WHOLE}[:10%%]'; a file has "
    f"'{WHOLE}' alone.",
    "dataset_test_split": "Split to evaluate on, or a part of one.",
    "dataset_streaming": "Read rows as they are needed. Unset, the `streaming` of a mixture holds.",
    "max_train_rows": "Rows to train on: the first of a shuffle with `seed`. Unset: all.",
    "max_eval_rows": "Rows to evaluate on: the first of a shuffle with `seed`. Unset: all.",
}
"""Help of the options that every command shares, by name, as `argparse` wants it."""


def file_kind(name: str) -> tuple[str, str | None] | None:
    """The builder of a file of that name and its compression by `fsspec`'s name; None for a kind that is not read."""
    builder, compression = _endings(name)
    if builder is None or (compression is not None and builder == "parquet"):
        return None
    return builder, compression


def names_file(name: str) -> bool:
    """Whether a name is a file's by its endings, also one of a kind that is not read: a compressed .parquet file."""
    return _endings(name)[0] is not None


def _endings(name: str) -> tuple[str | None, str | None]:
    name = name.lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    stem = name.removesuffix(ending)
    builder = next((builder for kind, builder in BUILDERS.items() if stem.endswith(kind)), None)
    return builder, COMPRESSIONS.get(ending)
