"""`otpo pairs`: preference pairs of a model's own answers, judged, as a file that `otpo align` reads."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from otpo.pairs.ledger import Ledger, has_entries, ledger_path, open_ledger
from otpo.pairs.pairing import PairingRule
from otpo.pairs.run import PairMaker, summarise, write_pairs
from otpo.pairs.sampling import SamplingOptions

from .launching.interrupt import interruptible
from .options.run_options import read_command_line
from .pairing.contents import CONTENTS
from .pairing.loading import contents_of, load_answering, load_prompts, make_judge
from .pairing.options import PairsArguments, check_options, identity_of, make_parser
from .running.command import REFUSALS, refuse

_WORDS = {"pair": "pairs", "tie": "ties", "low": "below `min_score_chosen`", "failed": "failed"}
_LINES = 10  # of progress, where no terminal shows a bar
_REASONS = 3  # that the summary shows


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the pairs and returns 0; 1 if no pair was made; 2 with one message for what can't be used."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return interruptible(
        "otpo pairs", lambda: _run(argv), lambda: "the same command goes on from the ledger beside `output`"
    )


def _run(argv: Sequence[str]) -> int:
    # Options, then what they name; what can't be used is refused before the first prompt.
    parser = make_parser()
    begin = time.monotonic()
    try:
        given = read_command_line(parser, argv)
        unknown = [*given.recipe_launcher, *given.launcher]
        if unknown:
            raise ValueError(f"Unknown option(s) {' '.join(unknown)}. `otpo pairs --help` lists those that there are.")
        options: PairsArguments = parser.parse_args_into_dataclasses(given.arguments, look_for_args_file=False)[0]
        output = check_options(options)
        drawing = SamplingOptions(
            options.num_samples, options.temperature, options.top_p, options.max_new_tokens, options.seed
        )
        rule = PairingRule(options.min_score_chosen, options.min_margin)
        prompts = load_prompts(options)
        identity = {**identity_of(given.values), **contents_of(options, prompts)}
        path = ledger_path(output)
        if output.exists() and not (path.exists() and has_entries(path)):
            raise ValueError(
                f"`output={output}` is there, and no ledger {path.name} beside it tells the run that wrote it. Name "
                "another file, or remove it."
            )
        with open_ledger(path, identity, options.retry_failed, CONTENTS) as ledger:
            known = sum(number in ledger.entries for number in prompts.numbers)
            lines = {"prompts": f"{len(prompts.rows):,} of {options.dataset_name}, {options.num_samples} answers each"}
            if known < len(prompts.rows):
                judge = make_judge(options)
                answering = load_answering(options, drawing)
                lines |= _describe(options, answering.described)
                maker = PairMaker(
                    answering.sampler, answering.tokenizer, judge, rule, options.batch_size, answering.longest_prompt
                )
            else:
                maker = None
            if known:
                lines["resuming"] = f"{known:,} prompts are in {path}"
            for name, value in lines.items():
                _print(f"{name:<10} {value}")
            if maker is not None:
                with _progress(len(prompts.rows), ledger) as done:
                    maker.run(prompts.rows, prompts.numbers, ledger, done)  # pyright: ignore[reportArgumentType]
            write_pairs(output, ledger.entries, prompts.numbers)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    except torch.OutOfMemoryError as error:
        told = f"{str(error).splitlines()[0]} Set `batch_size` below {given.values['batch_size']}: the run goes on."
        return refuse(parser.prog, ValueError(told))
    return _finish(output, path, ledger.entries, time.monotonic() - begin)


def _describe(options: PairsArguments, generator: str) -> dict[str, str]:
    """What really runs, line by line."""
    judge = options.judge
    if options.reward_model_name_or_path is not None:
        judge = f"{judge}, {options.reward_model_name_or_path}"
    filters = f"temperature {options.temperature:g}, top_p {options.top_p:g}"
    return {
        "model": str(options.model_name_or_path),
        "generator": generator,
        "answers": f"{filters}, up to {options.max_new_tokens} tokens, seed {options.seed}",
        "judge": str(judge),
    }


def _finish(output: Path, ledger: Path, entries: Mapping[int, Mapping[str, Any]], seconds: float) -> int:
    """The summary, and the exit code."""
    summary = summarise(entries)
    _print(f"{'result':<10} {_counted(summary.counts)} of {len(entries):,} prompts in {seconds:.0f} s")
    for reason, count in summary.reasons.most_common(_REASONS):
        _print(f"{'':<10} {count:,} times: {reason}")
    if summary.distinct == summary.distinct:  # not NaN
        _print(f"{'answers':<10} {summary.distinct:.1f} distinct a prompt, {summary.cut:.0%} of them cut off")
    if not summary.counts["pair"]:
        Console(stderr=True, soft_wrap=True).print(
            f"otpo pairs: error: no pair was made of {len(entries)} prompts, so `{output}` is empty. The reasons are "
            f"in {ledger}.",
            style="red",
            highlight=False,
            markup=False,
        )
        return 1
    _print(f"{'saved':<10} {output}, and all answers with their scores in {ledger}")
    return 0


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[kind]:,} {word}" for kind, word in _WORDS.items() if counts[kind])


@contextmanager
def _progress(total: int, ledger: Ledger) -> Iterator[Any]:
    """A bar with the time left on a terminal, and elsewhere a line now and then; yields what prompts are told to."""
    console = Console(soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin, before = time.monotonic(), len(ledger.entries)
    marks = [total * part // _LINES for part in range(1, _LINES + 1)]
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("prompts", total=total)

        def done(count: int) -> None:
            told = _counted(ledger.counts)
            bar.update(task, completed=count, description=told)
            if not console.is_terminal and marks and count >= marks[0]:
                while marks and count >= marks[0]:
                    marks.pop(0)
                new = max(len(ledger.entries) - before, 1)
                left = (time.monotonic() - begin) / new * (total - count)
                _print(f"{'progress':<10} {count:,} of {total:,} prompts, {told}, {left:.0f} s left")

        yield done


def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
