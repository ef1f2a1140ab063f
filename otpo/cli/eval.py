"""`otpo eval`: scores of a model by lm-eval's tasks, or of two side by side, with intervals."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time it is imported when options have been read
    from otpo.cli.evaluating.scores import Interval, Scores

_DESCRIPTION = """\
Score a model, or an adapter on one, by tasks of lm-eval, with 95% intervals. Our own tasks: `otpo_pairs`, whether the
right answer of a bundled test pair is the more probable one; `otpo_answers`, whether free answers to their prompts
have the right attribute, price, language and format. Both want `--apply_chat_template`. A .jsonl file of prompts is a
task too: `--judge` scores the free answers to them, as `otpo pairs` does.

  otpo eval runs/align --tasks otpo_pairs otpo_answers --apply_chat_template --output scores.json
  otpo eval runs/align --tasks held_out.jsonl --judge my_judge.py:score --apply_chat_template
  otpo eval Qwen/Qwen3-0.6B --compare runs/align --tasks ifeval path/to/my/tasks --limit 200
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="otpo eval",
        usage="otpo eval MODEL --tasks TASK [TASK ...] [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name on the Hub of a model, or an adapter's folder")
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names or patterns of lm-eval's tasks, ours, a folder of tasks' YAML files, such a file, or a .jsonl "
        "file of prompts",
    )
    add(
        "--judge",
        default="checkers",
        metavar="NAME",
        help="of free answers to a file's prompts: checkers, exact_match, or module:function or "
        "path/to/file.py:function of yours (checkers)",
    )
    add("--max_new_tokens", type=int, default=256, metavar="N", help="tokens of such an answer at most (256)")
    add("--compare", metavar="OTHER", help="a second model; the table shows both, and how much higher it scores")
    add("--apply_chat_template", action="store_true", help="ask in the model's chat template")
    add("--num_fewshot", type=int, metavar="N", help="examples before each question (the task's number)")
    add("--limit", type=int, metavar="N", help="first examples of each task alone, for a trial")
    add("--batch_size", type=int, default=8, metavar="N", help="(8)")
    add("--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16 (auto: the checkpoint's)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    add("--seed", type=int, default=0, metavar="N", help="of examples and sampled answers (0)")
    add("--output", metavar="FILE", help="write scores, intervals and options as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns 0, or 2 with one line for options, tasks or models that can't be used."""
    parser = make_parser()
    options = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"`--{name}` must be at least 1, got {value}.")
    from otpo.cli.running.command import REFUSALS, refuse

    try:
        report = _evaluate(options)
        _show(report)  # before the file, which a full disk may refuse
        if options.output is not None:
            _write(report, options.output)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    return 0


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from otpo.cli.evaluating import harness
    from otpo.cli.evaluating.judged import is_prompts, judged_tasks
    from otpo.cli.evaluating.scores import collect_scores
    from otpo.cli.models.loading import require_folder
    from otpo.cli.options.writing import require_writable_file

    # What needs no model is refused before one is loaded, both models' names too.
    harness.require_lm_eval()
    names = [options.model, *([options.compare] if options.compare else [])]
    for option, name in zip(("MODEL", "--compare"), names, strict=False):
        require_folder(option, name)
    if options.output is not None:
        if not Path(options.output).resolve().parent.is_dir():
            raise ValueError(f"`--output {options.output}`: there is no folder {Path(options.output).parent}.")
        require_writable_file("--output", options.output, "scores.json")
    asked = judged_tasks(options.tasks, options.judge, options.max_new_tokens)
    found, manager = harness.find_tasks([name for name in options.tasks if not is_prompts(name)])
    tasks = [*found, *asked]

    given = ("apply_chat_template", "num_fewshot", "limit", "batch_size", "dtype", "device", "seed")
    chosen = {name: getattr(options, name) for name in given}
    scores = [
        collect_scores(harness.evaluate(name, option, tasks, manager, **chosen))
        for option, name in zip(("MODEL", "--compare"), names, strict=False)
    ]
    return make_report(names, scores, {**chosen, "judge": options.judge, "max_new_tokens": options.max_new_tokens})


def _write(report: dict[str, Any], path: str) -> None:
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_report(names: list[str], scores: "list[Scores]", options: dict[str, Any]) -> dict[str, Any]:
    """The JSON report: a row for each metric of each task, with an interval for each model and for the difference.

    Args:
        names: One model, or two.
        scores: Of each.
        options: That the report repeats.
    """
    from otpo.cli.env import installed_version
    from otpo.cli.evaluating.scores import difference, interval

    rows = []
    for key, score in scores[0].items():
        both = [score, *(other[key] for other in scores[1:])]
        row: dict[str, Any] = {"task": key[0], "metric": key[1], "higher_is_better": score.higher_is_better}
        row["examples"] = None if score.values is None else len(score.values)
        row["models"] = [interval(it)._asdict() for it in both]
        if len(both) == 2:
            row["difference"] = difference(*both)._asdict()
        rows.append(row)
    versions = {name: installed_version(name) for name in ("otpo", "lm_eval", "transformers", "torch")}
    return {"models": names, "scores": rows, "options": options, "versions": versions}


def _show(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from otpo.cli.evaluating.scores import Interval

    table = Table(box=box.HORIZONTALS)
    for title in ("task", "metric"):
        table.add_column(title, no_wrap=True)
    for title in ("examples", *map(escape, report["models"])):
        table.add_column(title, overflow="fold", justify="right")
    if len(report["models"]) == 2:
        table.add_column("difference", justify="right")
    for row in report["scores"]:
        found = [Interval(**it) for it in row["models"]]
        cells = [row["task"], row["metric"], str(row["examples"] or ""), *map(_text, found)]
        if "difference" in row:
            change = Interval(**row["difference"])
            cells.append(f"{_text(change, sign='+')}{_verdict(change, row['higher_is_better'])}")
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(table)
    limit = report["options"]["limit"]
    console.print(
        "In brackets: 95% intervals; that of a difference is over the same examples, paired."
        + (f" Of each task the first {limit} examples alone." if limit else ""),
        style="dim",
        markup=False,
    )


def _text(found: "Interval", sign: str = "") -> str:
    value = f"{found.value:{sign}.4g}"
    return value if found.low is None else f"{value} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _verdict(change: "Interval", higher_is_better: bool | None) -> str:
    """Better or worse where the interval leaves out 0."""
    if change.low is None or change.high is None or higher_is_better is None or change.low <= 0 <= change.high:
        return ""
    return " better" if (change.value > 0) == higher_is_better else " worse"


if __name__ == "__main__":
    sys.exit(main())
