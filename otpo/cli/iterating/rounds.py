"""A round: the model's own pairs, alignment on them, and a count of right answers to held-out prompts.

Each step leaves a file when it is done, so that a run that was killed goes on where it stood.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig

from otpo.cli.pairing.contents import model_digest
from otpo.cli.pairing.loading import pick_device
from otpo.data.loading import RowArguments, load_rows
from otpo.data.preferences import RowError
from otpo.pairs.judges import JudgeError, judged, load_judge
from otpo.pairs.ledger import ledger_path
from otpo.pairs.pairing import reaches
from otpo.pairs.prompts import find_prompt
from otpo.pairs.run import read_summary

from .steps import console, greedy_answers, load_for_answers, run


def held_out_rows(held_out: Mapping[str, Any]) -> Any:
    """The rows whose prompts are answered after each round.

    Raises:
        ValueError: They can't be read, there are none, or one has no prompt to answer; the message says which.
    """
    source = RowArguments(dataset_name=held_out["dataset_name"], dataset_train_split=held_out["dataset_train_split"])
    rows: Any = load_rows(source, DatasetMixtureConfig(), seed=0, evaluate=False)[0]
    named = f"`held_out`: `dataset_name: {held_out['dataset_name']}`"
    if not len(rows):
        raise ValueError(f"{named} has no rows, so there are no prompts to answer. Name another.")
    for number, row in enumerate(rows):
        try:
            find_prompt(row)
        except ValueError as error:
            raise RowError(f"Row {number} of {named} {error}.") from error
    return rows


def count_right(
    model: str | Path, held_out: Mapping[str, Any], use_cpu: bool, options: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """How many of the held-out prompts a model answers right, greedily.

    Args:
        model: Its folder or name.
        held_out: Of the plan.
        use_cpu: Whether GPUs are left alone; without one it answers on the CPU, as `otpo pairs` does.
        options: Others of `otpo pairs`, of which `model_revision` and `trust_remote_code` say how it is loaded.

    Returns:
        `right`, `held_out` (the number of prompts) and `judge_failed`, the prompts that the judge failed for.
    """
    rows = held_out_rows(held_out)
    prompts = [find_prompt(row) for row in rows]
    options = options or {}
    loaded = load_for_answers(
        model, pick_device(use_cpu), options.get("model_revision", "main"), options.get("trust_remote_code", False)
    )
    answers = greedy_answers(*loaded, prompts, held_out["max_new_tokens"], held_out["batch_size"], rows)
    judge, right, failed = load_judge(held_out["judge"]), 0, 0
    for number, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        try:
            right += reaches(judged(judge, prompt, [answer], row)[0], held_out["right_from"])
        except JudgeError as error:
            failed += 1
            console.print(f"held-out prompt {number}: {error}", style="red", markup=False)
    return {"right": right, "held_out": len(prompts), "judge_failed": failed}


def run_round(number: int, start: str | Path, folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """One round: pairs, alignment, and the answers of what came out.

    What is there of it is taken as it is, if it was made of the same model; a model is aligned anew on other pairs.

    Args:
        number: Of the round, from 1.
        start: The model it starts with.
        folder: Of the round; `pairs.jsonl` and `model` are left there.
        plan: From [`read_plan`][otpo.cli.iterating.plan.read_plan].

    Returns:
        The round's row of the table.
    """
    done, begun = folder / "round.json", folder / "begun.json"
    made_of = model_digest("model_name_or_path", str(start))
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8"))["start"] != made_of:
        raise SystemExit(
            f"`output`: {folder} was made of another model than {start} is now. Remove {folder} and the rounds after "
            "it to make them anew."
        )
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    _write(begun, {"start": made_of})
    pairs, report = folder / "pairs.jsonl", folder / "align.json"
    seed = plan["seed"] + number - 1
    run("pairs", {"model_name_or_path": start, "output": pairs, "seed": seed, **plan["pairs"]})
    aligned, of = folder / "aligned.json", {"pairs": hashlib.sha256(pairs.read_bytes()).hexdigest()[:16]}
    same = aligned.is_file() and json.loads(aligned.read_text(encoding="utf-8")) == of
    if not (report.is_file() and same):  # the last thing that an alignment writes, after its model
        report.unlink(missing_ok=True)
        _write(aligned, of)
        shutil.rmtree(folder / "model", ignore_errors=True)
        named = {"model_name_or_path": start, "dataset_name": pairs, "output_dir": folder / "model", "report": report}
        run("align", {**named, "seed": seed, **plan["align"]})
    counts = read_summary(ledger_path(pairs)).counts
    found = {"round": number, "pairs": counts["pair"], "ties": counts["tie"], "failed": counts["failed"]}
    found |= _count(folder / "model", plan)
    _write(done, found)
    return found


def first_row(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The table's row of the model as it starts, as round 0."""
    done = folder / "start.json"
    if not done.is_file():
        right = _count(plan["model_name_or_path"], plan)
        _write(done, {"round": 0, "pairs": "", "ties": "", "failed": "", **right})
    return json.loads(done.read_text(encoding="utf-8"))


def _count(model: str | Path, plan: Mapping[str, Any]) -> dict[str, int]:
    return count_right(model, plan["held_out"], plan["pairs"].get("use_cpu", False), plan["pairs"])


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """A file that is there is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    part.replace(path)
