"""`otpo import`: a Qwen3-MoE or Mixtral checkpoint as a Compass one."""

import argparse
import sys
from collections.abc import Sequence

from otpo.cli.converting.command import add_shared_options, show, write
from otpo.cli.launching.interrupt import ended_by_signal

_DESCRIPTION = """\
Write a Qwen3-MoE or Mixtral model as the Compass model that computes the same, to be trained with MTP layers, our
experts and expert parallelism. What Compass lacks (dense layers, sliding windows, quantized weights) is refused.

  otpo import Qwen/Qwen3-30B-A3B models/qwen3-as-compass
  otpo import mistralai/Mixtral-8x7B-v0.1 models/mixtral-as-compass --verify
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="otpo import",
        usage="otpo import MODEL OUT [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder or name on the Hub of the model, or an adapter's folder"
    )
    parser.add_argument("out", metavar="OUT", help="the new folder")
    add_shared_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the model and says how; returns 0, or 2 with one line for what can't be imported."""
    parser = make_parser()
    options = parser.parse_args(argv)
    from otpo.cli.running.command import REFUSALS, refuse

    try:
        with ended_by_signal(parser.prog):
            _import(options)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    return 0


def _import(options: argparse.Namespace) -> None:
    import transformers

    from moe_backbone.conversion.folders import require_new_folder
    from moe_backbone.conversion.importing import import_model
    from moe_backbone.model import modeling_compass
    from otpo.cli.converting.source import open_source

    require_new_folder(options.out)
    source = open_source(options.model, options.revision, keep_dtype=options.dtype is None, verify=options.verify)
    written, lines = write(import_model, source, transformers, modeling_compass, options.out, options)
    show(written, options.out, lines)


if __name__ == "__main__":
    sys.exit(main())
