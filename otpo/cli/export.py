"""`otpo export`: a Compass checkpoint in an architecture that everyone serves."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from otpo.cli.converting.command import add_shared_options, show, write
from otpo.cli.launching.interrupt import ended_by_signal

_DESCRIPTION = """\
Write a Compass model as the architecture of transformers that computes the same: Qwen3-MoE; Qwen3-Next where it has
shared experts; Mixtral where it has no norms of queries and keys. vLLM, SGLang, llama.cpp, lm-eval and trl read these.
An adapter (PEFT) is merged into its model. What changes no answer is left out, MTP layers for one; what would change
answers is refused.

  otpo export runs/my-model served/my-model
  otpo export runs/my-adapter served/my-model --dtype bfloat16 --verify
  otpo export runs/my-model my-model.gguf --format gguf --converter ~/llama.cpp
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="otpo export",
        usage="otpo export MODEL OUT [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder or name on the Hub of a Compass model, or an adapter's folder"
    )
    parser.add_argument("out", metavar="OUT", help="the new folder; with `--format gguf` the new file")
    add_shared_options(parser)
    add = parser.add_argument_group("llama.cpp").add_argument
    add("--format", choices=("safetensors", "gguf"), default="safetensors", help="gguf runs llama.cpp's converter")
    add(
        "--converter", metavar="PATH", help="convert_hf_to_gguf.py, or llama.cpp's folder ($LLAMA_CPP, or on the path)"
    )
    add("--outtype", default="auto", metavar="NAME", help="of the converter: f32, f16, bf16, q8_0, auto (auto)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the model and says how; returns 0, or 2 with one line for what can't be exported."""
    parser = make_parser()
    options = parser.parse_args(argv)
    from otpo.cli.running.command import REFUSALS, refuse

    try:
        with ended_by_signal(parser.prog):
            _export(options)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    return 0


def _export(options: argparse.Namespace) -> None:
    import transformers

    from moe_backbone.conversion import gguf
    from moe_backbone.conversion.exporting import export_model
    from moe_backbone.conversion.folders import require_new_folder
    from moe_backbone.conversion.unfinished import unfinished_folder
    from moe_backbone.model import modeling_compass
    from otpo.cli.converting.source import open_source
    from otpo.cli.models import compass  # noqa: F401 - makes its models known to the Auto classes

    # What needs no weights is refused before an adapter is merged.
    as_gguf = options.format == "gguf"
    converter = gguf.find_converter(options.converter, os.environ) if as_gguf else None
    if not as_gguf:
        require_new_folder(options.out)
    elif os.path.lexists(options.out):
        raise ValueError(f"{options.out} is there already. Name a new file, or remove this one.")
    source = open_source(options.model, options.revision, keep_dtype=options.dtype is None, verify=options.verify)
    kind = source.config.model_type
    if kind != modeling_compass.CompassConfig.model_type:
        raise ValueError(
            f"`MODEL={options.model}` is of `model_type={kind}`. `otpo export` writes Compass models for those who "
            "read them under other names; transformers' own models need no export."
        )
    if as_gguf:
        gguf.require_same_in_llama_cpp(source.config)

    # A file in llama.cpp's format is made of a folder, which goes when the file is there.
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(out) as temporary:
        folder = str(temporary / "model") if as_gguf else options.out
        written, lines = write(export_model, source, modeling_compass, transformers, folder, options)
        if converter is not None:
            gguf.write_gguf(converter, Path(folder), out, options.outtype)
            lines["converter"] = f"{converter}, `--outtype {options.outtype}`"
        show(written, options.out, lines)


if __name__ == "__main__":
    sys.exit(main())
