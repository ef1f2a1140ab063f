"""`otpo quantize`: a Mixture-of-Experts model in FP8, calibrated so that rare experts are seen too."""

import argparse
import sys
from collections.abc import Sequence

from otpo.cli.launching.interrupt import ended_by_signal
from otpo.cli.quantizing.options import check, make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the model and its report; returns 0, or 2 with one line for what can't be quantized."""
    parser = make_parser()
    options = parser.parse_args(argv)
    from otpo.cli.running.command import REFUSALS, refuse

    try:
        check(options)
        with ended_by_signal(parser.prog):
            _quantize(options)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    return 0


def _quantize(options: argparse.Namespace) -> None:
    from moe_backbone.conversion.folders import require_new_folder
    from moe_backbone.quantization.scheme import require_compressed_tensors
    from otpo.cli.converting.command import parse_size
    from otpo.cli.running.console import be_quiet

    # What needs no model is refused first.
    require_compressed_tensors()
    require_new_folder(options.out)
    parse_size(options.max_shard_size)
    be_quiet()
    from otpo.cli.quantizing.run import quantize

    quantize(options)


if __name__ == "__main__":
    sys.exit(main())
