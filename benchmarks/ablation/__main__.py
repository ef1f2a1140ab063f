"""Compare token weightings: weighting x data x seed, from one SFT checkpoint, into one table and its figures.

    python -m benchmarks.ablation --matrix benchmarks/ablation/quick.yaml --output runs/ablation_quick
    python -m benchmarks.ablation --matrix MATRIX.yaml --checkpoint runs/sft --judge my_package.judges:reward_model
    python -m benchmarks.ablation --matrix MATRIX.yaml --weightings dpo budget otpo --seeds 0 1 2 --output runs/three

Run it again to go on where it stopped: cells that are done are kept, those that failed are tried again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from transformers.utils import logging

from .cells import NAMED, Matrix, read_matrix, weightings_of
from .judges import load_judge
from .start import DOCUMENTS, make_start


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Matrix]:
    """The command line and the matrix it describes; raises `ValueError` or `OSError` with what is wrong with it."""
    parser = argparse.ArgumentParser(
        "benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--matrix", type=Path, required=True, help="YAML file, see benchmarks/ablation/quick.yaml")
    parser.add_argument("--weightings", nargs="*", metavar="NAME", help=f"in place of the file's: {' '.join(NAMED)}")
    parser.add_argument(
        "--data", nargs="*", metavar="NAME", help="in place of the file's: bundled data or JSONL files"
    )
    parser.add_argument("--seeds", nargs="*", type=int, metavar="SEED", help="in place of the file's")
    parser.add_argument("--checkpoint", type=Path, help="SFT model with its tokenizer (default: one is made)")
    parser.add_argument("--start", choices=list(DOCUMENTS), default="tiny", help="which one is made (default: tiny)")
    parser.add_argument(
        "--start-steps",
        type=int,
        nargs=2,
        default=(120, 120),
        metavar="N",
        help="of its pretraining and its SFT (120)",
    )
    judges = "'checkers', 'none', reward:FOLDER or package.module:callable"
    parser.add_argument("--judge", default="checkers", help=f"{judges} (default: checkers)")
    parser.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="K/N",
        help="run every N-th cell alone, from the K-th on, so that N processes share the matrix; run it once more "
        "without this for the table",
    )
    parser.add_argument("--only-report", action="store_true", help="run nothing, write the table of what is there")
    parser.add_argument("--keep-models", action="store_true", help="save trained models under OUTPUT/models")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args(argv)
    weightings = None if args.weightings is None else weightings_of(args.weightings)
    return args, read_matrix(args.matrix, weightings=weightings, data=args.data, seeds=args.seeds)


def _part(text: str) -> tuple[int, int]:
    """`K/N`, from 1, as `(k, n)` with k from 0."""
    try:
        place, parts = map(int, text.split("/"))
    except ValueError:
        place, parts = 0, 0
    if not 1 <= place <= parts:
        raise argparse.ArgumentTypeError(f"must be K/N with 1 <= K <= N, got {text!r}")
    return place - 1, parts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the matrix; 1 if a cell failed, 2 if there is something wrong with what was asked."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    try:
        args, matrix = read_arguments(argv)
        judge = None if args.only_report else load_judge(args.judge)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        disable_progress_bars()
        from .report import report
        from .run import run_matrix

        checkpoint = args.checkpoint or make_start(
            args.output / "start", matrix.languages, tuple(args.start_steps), args.start
        )
        part = None if args.only_report else args.part
        results = run_matrix(
            matrix, checkpoint, args.output, judge, args.judge, console, part=part, keep_models=args.keep_models
        )
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    if args.only_report or args.part[1] == 1:
        report(matrix, results, args.output, console)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
