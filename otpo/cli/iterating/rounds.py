"""A round: the model's own pairs, alignment on them, and a count of right answers to held-out prompts.

Each step leaves a file when it is done, so that a run that was killed goes on where it stood.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig

from otpo.data.loading import RowArguments, load_rows
from otpo.pairs.judges import JudgeError, judged, load_judge
from otpo.pairs.ledger import ledger_path
from otpo.pairs.prompts import find_prompt
from otpo.pairs.run import read_summary

from .steps import console, greedy_answers, load_for_answers, run


def held_out_rows(held_out: Mapping[str, Any]) -> Any:
    """The rows whose prompts are answered after each round.

    Raises:
        ValueError: They can't be read; the message says why.
    """
    source = RowArguments(dataset_name=held_out["dataset_name"], dataset_train_split=held_out["dataset_train_split"])
    return load_rows(source, DatasetMixtureConfig(), seed=0, evaluate=False)[0]


def count_right(model: str | Path, held_out: Mapping[str, Any], use_cpu: bool) -> dict[str, int]:
    """How many of the held-out prompts a model answers right, greedily.

    Args:
        model: Its folder or name.
        held_out: Of the plan.
        use_cpu: Whether it answers on the CPU rather than on a GPU.

    Returns:
        `right`, `held_out` (the number of prompts) and `judge_failed`, the prompts that the judge failed for.
    """
    rows = held_out_rows(held_out)
    prompts = [find_prompt(row) for row in rows]
    device = "cpu" if use_cpu else "cuda"
    answering = load_for_answers(Path(model), device)
    answers = greedy_answers(*answering, prompts, held_out["max_new_tokens"], held_out["batch_size"])
    judge, right, failed = load_judge(held_out["judge"]), 0, 0
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        try:
            right += judged(judge, prompt, [answer], row)[0] >= held_out["right_from"]
        except JudgeError as error:
            failed += 1
            console.print(f"held-out prompt {row}: {error}", style="red", markup=False)
    return {"right": right, "held_out": len(prompts), "judge_failed": failed}


def run_round(number: int, start: str | Path, folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """One round: pairs, alignment, and the answers of what came out. What is there of it is taken as it is.

    Args:
        number: Of the round, from 1.
        start: The model it starts with.
        folder: Of the round; `pairs.jsonl` and `model` are left there.
        plan: From [`read_plan`][otpo.cli.iterating.plan.read_plan].

    Returns:
        The round's row of the table.
    """
    done = folder / "round.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    pairs, report = folder / "pairs.jsonl", folder / "align.json"
    seed = plan["seed"] + number - 1
    run("pairs", {"model_name_or_path": start, "output": pairs, "seed": seed, **plan["pairs"]})
    if not report.is_file():  # the last thing that an alignment writes, after its model
        shutil.rmtree(folder / "model", ignore_errors=True)
        named = {"model_name_or_path": start, "dataset_name": pairs, "output_dir": folder / "model", "report": report}
        run("align", {**named, "seed": seed, **plan["align"]})
    counts = read_summary(ledger_path(pairs)).counts
    found = {"round": number, "pairs": counts["pair"], "ties": counts["tie"], "failed": counts["failed"]}
    found |= count_right(folder / "model", plan["held_out"], plan["pairs"].get("use_cpu", False))
    _write(done, found)
    return found


def first_row(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The table's row of the model as it starts, as round 0."""
    done = folder / "start.json"
    if not done.is_file():
        right = count_right(plan["model_name_or_path"], plan["held_out"], plan["pairs"].get("use_cpu", False))
        _write(done, {"round": 0, "pairs": "", "ties": "", "failed": "", **right})
    return json.loads(done.read_text(encoding="utf-8"))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """A file that is there is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    part.replace(path)
