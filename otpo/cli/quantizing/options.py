"""Options of `otpo quantize`, and what they contradict each other in."""

import argparse
from collections.abc import Iterable, Mapping

from otpo.cli.converting.command import DTYPES

_DESCRIPTION = """\
Write a Mixture-of-Experts model in FP8 (W8A8) as compressed-tensors, the format that vLLM reads. MODEL is a Compass
model, which is exported first, or an exported one, or another of transformers with a key for each expert.

What goes into each matrix is measured on documents. A router sends few tokens to some experts; `--calibration
expert_aware` draws documents until each expert of each layer has seen its share of rows. The report compares both
draws on held-out documents, and on right answers where `--prompts` names a file. A run that was ended starts anew.

  otpo quantize runs/my-model served/my-model-fp8 --dataset_name otpo/demo-corpus
  otpo quantize served/my-model served/my-model-fp8 --dataset_name docs.jsonl --prompts held_out.jsonl --dtype bfloat16
  otpo quantize served/my-model served/my-model-fp8 --input_scales dynamic --skip_report
"""
_OF_THE_DRAW: dict[str, object] = {
    "calibration": "expert_aware",
    "min_rows_per_expert": 256,
    "calibration_tokens": 131072,
    "max_train_rows": 2048,
}
_OF_DOCUMENTS: dict[str, object] = {
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "test_split_size": None,
    "text_column": None,
    "max_eval_rows": 256,
    "max_length": None,
}
"""Options that not every run reads, and what they are where one that does is not told."""
# What the library calls these; its modules bring torch, which `--help` does without.
_DRAWS = ("expert_aware", "uniform")
_SCALES = ("static", "dynamic")
_POSITIVE = (
    "max_train_rows",
    "max_eval_rows",
    "max_length",
    "min_rows_per_expert",
    "calibration_tokens",
    "batch_size",
)
_POSITIVE += ("max_new_tokens",)


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="otpo quantize",
        usage="otpo quantize MODEL OUT --dataset_name DATA [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name on the Hub of a model; of a Compass model an adapter's too")
    add("out", metavar="OUT", help="the new folder")
    add("--dtype", choices=DTYPES, help="to compute in, and of what stays as it is (the checkpoint's)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub (main)")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="of a file of weights at most (5GB)")
    add("--batch_size", type=int, default=8, metavar="N", help="documents of a forward pass (8)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (0)")

    add = parser.add_argument_group("calibration").add_argument
    add(
        "--input_scales",
        choices=_SCALES,
        default="static",
        help="static: a scale for what goes into each matrix, measured; dynamic: one a token, with scales for each "
        "channel of the weights, which needs no documents (static)",
    )
    add(
        "--calibration",
        choices=_DRAWS,
        help="the draw whose scales are written (expert_aware)",
    )
    add(
        "--min_rows_per_expert",
        type=int,
        metavar="N",
        help="an expert's share: rows that each expert of each layer is to see (256)",
    )
    add(
        "--calibration_tokens",
        type=int,
        metavar="N",
        help="tokens that a draw takes at most, of either kind (131072)",
    )

    add = parser.add_argument_group("documents").add_argument
    add("--dataset_name", metavar="DATA", help="name on the Hub, local file, saved folder, or otpo/demo-corpus")
    add("--dataset_config", metavar="NAME", help="configuration on the Hub; of a bundled set its number of rows")
    add("--dataset_train_split", metavar="SPLIT", help="to draw from (train)")
    add("--dataset_test_split", metavar="SPLIT", help="held out, to compare by (test)")
    add("--test_split_size", type=float, metavar="SIZE", help="cut a held-out split of this share or number of rows")
    add("--text_column", metavar="NAME", help="column of the documents (text, input_ids, messages or prompt)")
    add("--max_train_rows", type=int, metavar="N", help="documents to draw from at most (2048)")
    add("--max_eval_rows", type=int, metavar="N", help="held-out documents at most (256)")
    add(
        "--max_length",
        type=int,
        metavar="N",
        help="tokens of a document at most; the rest is cut (2048, or the model's positions where those are fewer)",
    )

    add = parser.add_argument_group("report").add_argument
    add("--skip_report", action="store_true", help="measure no loss before and after")
    add("--prompts", metavar="FILE", help=".jsonl of prompts: right answers before and after, as `otpo eval` asks")
    add("--judge", default="checkers", metavar="NAME", help="of the answers to them, as in `otpo eval` (checkers)")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="tokens of such an answer at most (256)")
    add("--apply_chat_template", action="store_true", help="ask in the model's chat template")
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuses what needs no file to be refused, and sets what an option is that was not given.

    Options that nothing reads in such a run stay None.

    Raises:
        ValueError: The message names the option and what to set.
    """
    for name in _POSITIVE:
        value = getattr(options, name)
        least = 2 if name == "max_length" else 1  # a document of one token has no loss
        if value is not None and value < least:
            raise ValueError(f"`--{name} {value}`: it must be at least {least}.")
    dynamic = options.input_scales == "dynamic"
    if dynamic:
        _refuse_unread(
            options,
            _OF_THE_DRAW,
            "`--input_scales dynamic`, which draws no documents. Drop it, or set `--input_scales static`.",
        )
    if dynamic and options.skip_report:
        reason = "`--input_scales dynamic --skip_report`, which reads no documents. Drop it, or `--skip_report`."
        _refuse_unread(options, _OF_DOCUMENTS, reason)
    elif options.dataset_name is None:
        raise ValueError(
            "No documents are named to compare by. Set `--dataset_name`, or `--skip_report`."
            if dynamic
            else "No documents are named, and `--input_scales static` measures on some. Set `--dataset_name`, or "
            "`--input_scales dynamic`."
        )
    else:
        if options.skip_report:
            reason = "`--skip_report`, which compares nothing. Drop one of them."
            _refuse_unread(options, ("max_eval_rows",), reason)
        _set_defaults(options, _OF_DOCUMENTS)
    if not dynamic:
        _set_defaults(options, _OF_THE_DRAW)
    if options.skip_report and options.prompts is not None:
        raise ValueError(
            f"`--prompts {options.prompts}` is of the report, which `--skip_report` leaves out. Drop one."
        )


def _refuse_unread(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"`--{name} {value}` means nothing with {reason}")


def _set_defaults(options: argparse.Namespace, defaults: Mapping[str, object]) -> None:
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
