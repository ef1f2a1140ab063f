"""Do token weights find what is right and what is wrong? On bundled pairs, whose spans are known; AUROC by layer.

    python -m benchmarks.weight_quality --model runs/demo/sft --output runs/weight_quality
    python -m benchmarks.weight_quality --model runs/demo/align --reference runs/demo/sft --layers all --output FOLDER

Weights of every scheme are made of the policy's hidden states before each token, as in training. With a reference,
what each token adds to the reward, `w (log pi - log pi_ref)`, is ranked as well: up for chosen, down for rejected
answers. Settings and layers are also chosen on one half of the pairs and reported on the other (`halves.csv`); one
setting for several models is what `python -m benchmarks.weight_quality.across` chooses of their folders.
Answers that are right or wrong as a whole (kinds language and format) have no span to find: they are left out
and counted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from transformers.utils import logging

from otpo.data import load_demo_preferences

from .across import save_found
from .halves import choices, report_halves
from .report import report, table_rows
from .scores import SCHEMES, Scorer, resolve_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; raises `ValueError` with what is wrong with it."""
    parser = argparse.ArgumentParser(
        "benchmarks.weight_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the policy: a folder or a name of the Hub")
    parser.add_argument("--reference", help="the model that it was trained from")
    parser.add_argument("--languages", nargs="+", metavar="NAME", help="of the pairs (default: all seven)")
    parser.add_argument("--pairs", type=int, help="a shuffle's first; beyond the bundled ones, more are drawn")
    parser.add_argument("--layers", nargs="+", default=["all"], metavar="N", help="'all', 'last' or numbers")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="NAME", help=" ".join(SCHEMES))
    parser.add_argument("--dtype", default="float32", help=f"of the models: {', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--batch", type=int, default=16, help="pairs in a forward pass (default: 16)")
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV file and the figure")
    args = parser.parse_args(argv)
    for name in ("pairs", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    if unknown := [name for name in args.schemes if name not in SCHEMES]:
        raise ValueError(f"`--schemes` has {unknown}, and there are {list(SCHEMES)}. Name one or more of them.")
    if args.dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {list(DTYPES)}, got {args.dtype!r}.")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"`--output {args.output}` is a file. Name a folder.")
    args.schemes = list(dict.fromkeys(args.schemes))
    return args


def load_pairs(languages: Sequence[str] | None, count: int | None) -> Dataset:
    """Held-out pairs with their spans: the first of a shuffle, so that a few are of all kinds."""
    pairs = load_demo_preferences("test", languages)
    if count is not None and count > len(pairs):
        pairs = load_demo_preferences("test", languages, count=count)
    return pairs.shuffle(seed=0).take(min(count or len(pairs), len(pairs)))


def main(argv: Sequence[str] | None = None) -> int:
    """Scores, ranks and reports; 2 if there is something wrong with what was asked."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    begin = time.monotonic()
    try:
        args = read_arguments(argv)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        disable_progress_bars()
        pairs = load_pairs(args.languages, args.pairs)
        scorer = Scorer(pairs, args.model, args.reference, dtype=DTYPES[args.dtype], use_cpu=args.use_cpu)
        layers = resolve_layers(args.layers, scorer.last)
        found = scorer.find(args.schemes, layers, args.batch, console)
        report(table_rows(found, args.model, args.reference), args.output, console)
        report_halves(choices(found, args.model, args.reference), args.output, console)
        save_found(found, args.output, args.model, args.reference)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    console.print(f"{len(pairs)} pairs, {len(layers)} layers, {time.monotonic() - begin:.1f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
