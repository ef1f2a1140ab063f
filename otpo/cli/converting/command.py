"""Options and lines that `otpo export` and `otpo import` share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time it is imported when options have been read, since it brings torch
    from moe_backbone.conversion.exporting import Written

DTYPES = ("float32", "bfloat16", "float16")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Adds what both commands take."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; each stays as it is where left out")
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="of a file of weights at most, which is also the memory that is needed (5GB)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub (main)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="before OUT gets its name, load both models, one after the other, and compare their logits in float32",
    )


def write(
    convert: Any, source: Any, source_module: Any, target_module: Any, out: str, options: argparse.Namespace
) -> "tuple[Written, dict[str, str]]":
    """Calls `export_model` or `import_model` with the options of the command line.

    Args:
        convert: The function.
        source: The model to convert.
        source_module: Where its class is.
        target_module: Where the written model's class is.
        out: The new folder. It does not get its name where `--verify` fails.
        options: Of the command line.

    Returns:
        What was written, and lines on it by their names.
    """
    import torch

    lines = {}

    def check(folder: Path, written: "Written") -> None:
        lines["verified"] = verify(source, source_module, folder, written, target_module)

    written = convert(
        source.config,
        source.tensors,
        out,
        side_folders=source.folders,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        max_shard_size=parse_size(options.max_shard_size),
        check=check if options.verify else None,
    )
    return written, lines


def parse_size(text: str) -> int:
    """The bytes that `--max_shard_size` names.

    Raises:
        ValueError: It names none.
    """
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        size = parse_size_to_int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"`--max_shard_size={text}`: write a number and a unit, as 5GB or 500MB.")
    return size


def verify(source: Any, model_module: Any, folder: Path, written: "Written", target_module: Any) -> str:
    """Compares the logits of the model that was converted and of the one that was written, one in memory at a time.

    Args:
        source: The model that was converted.
        model_module: Where its class is.
        folder: The written model.
        written: What was written.
        target_module: Where the written model's class is.

    Raises:
        ValueError: They differ.
    """
    from moe_backbone.conversion.verifying import answers, require_equal

    model = source.model
    if model is None:
        model_class = getattr(model_module, written.source)
        model = model_class.from_pretrained(source.folders[0], dtype=written.dtype)
    for parameter in model.parameters():  # a merged model's; `model.to` would round rotary positions as well
        parameter.data = parameter.data.to(written.dtype)
    before = answers(model)
    del model
    after = answers(getattr(target_module, written.architecture).from_pretrained(folder, dtype=written.dtype))
    return f"logits differ by {require_equal(before, after):.2g} at most, in float32"


def show(written: "Written", out: str, lines: dict[str, str]) -> None:
    """Prints what was written, what was left out, and further lines by their names."""
    from rich.console import Console

    console = Console(soft_wrap=True)

    def line(name: str, value: str) -> None:
        console.print(f"{name:<10} {value}", highlight=False, markup=False)

    line("model", f"{written.title} ({written.architecture}): {written.why}")
    for sentence in written.left_out:
        line("left out", sentence)
    files = "1 file" if written.shards == 1 else f"{written.shards} files"
    line("weights", f"{str(written.dtype).removeprefix('torch.')}, {files}")
    for name, value in lines.items():
        line(name, value)
    line("saved", out)
