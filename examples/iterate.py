"""Rounds of a model's own pairs and alignment, from one YAML; after each, its answers to held-out prompts are counted.

    python examples/iterate.py examples/iterate.yaml

A round is `otpo pairs` and `otpo align`, printed before they run; `ROUND/pairs.jsonl` and `ROUND/model` are what they
leave. At the end there are a table (also `rounds.csv`) and a figure (`rounds.png`). A run that was killed goes on when
the same command is given again: steps that are done are not done again, and pairs go on from their ledger.
"""

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib.pyplot as plt
import yaml
from rich.table import Table
from steps import console, greedy_answers, run
from transformers.utils import logging
from trl import DatasetMixtureConfig

from otpo.data.loading import RowArguments, load_rows
from otpo.pairs.judges import JudgeError, judged, load_judge
from otpo.pairs.ledger import ledger_path
from otpo.pairs.prompts import find_prompt
from otpo.pairs.run import read_summary

KEYS = {"output", "rounds", "seed", "model_name_or_path", "pairs", "align", "held_out"}
HELD_OUT = {"dataset_name": None, "dataset_train_split": "train", "judge": None, "right_from": 1.0}
HELD_OUT |= {"max_new_tokens": 256, "batch_size": 32}
SET_HERE = {"model_name_or_path", "dataset_name", "output", "output_dir", "seed", "report"}
COLUMNS = ("round", "pairs", "ties", "failed", "right", "held_out", "judge_failed")


def read_plan(path: str) -> dict[str, Any]:
    """The YAML, looked at; a `ValueError` names the key and the remedy."""
    plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(plan, dict) or set(plan) != KEYS:
        found = sorted(plan) if isinstance(plan, dict) else type(plan).__name__
        raise ValueError(f"{path} must hold the keys {sorted(KEYS)}, got {found}.")
    if not isinstance(plan["rounds"], int) or plan["rounds"] < 1:
        raise ValueError(f"{path}: `rounds` must be a whole number of at least 1, got {plan['rounds']!r}.")
    unknown = sorted(set(plan["held_out"]) - set(HELD_OUT))
    if unknown:
        raise ValueError(f"{path}: `held_out` has {unknown}; it takes {sorted(HELD_OUT)}.")
    plan["held_out"] = {**HELD_OUT, **plan["held_out"]}
    for name in ("dataset_name", "judge"):
        if plan["held_out"][name] is None:
            raise ValueError(f"{path}: `held_out` has no `{name}`. Set it as `otpo pairs` takes it.")
    for part, set_here in (("pairs", SET_HERE - {"dataset_name"}), ("align", SET_HERE)):
        taken = sorted(set(plan[part]) & set_here)
        if taken:
            raise ValueError(f"{path}: `{part}` has {taken}, which each round sets itself. Remove them.")
    return plan


def require_same_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Notes the plan in the folder; raises a `ValueError` where a run of another plan has begun there.

    More rounds are the same plan, so that a run may be lengthened.
    """
    file = folder / "iterate.json"
    told = {name: value for name, value in plan.items() if name not in ("rounds", "output")}
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = sorted(name for name in told if before.get(name) != told[name])
        if other:
            raise ValueError(
                f"`output: {folder}` has the rounds of another plan, which differs in {other}. Name another folder, "
                f"or remove {folder} to start anew."
            )
    file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def count_right(model: str | Path, held_out: Mapping[str, Any], use_cpu: bool) -> dict[str, int]:
    """How many of the held-out prompts a model answers right, of how many, and for how many the judge failed."""
    source = RowArguments(dataset_name=held_out["dataset_name"], dataset_train_split=held_out["dataset_train_split"])
    rows: Any = load_rows(source, DatasetMixtureConfig(), seed=0, evaluate=False)[0]
    prompts = [find_prompt(row) for row in rows]
    device = "cpu" if use_cpu else "cuda"
    answers = greedy_answers(Path(model), prompts, held_out["max_new_tokens"], held_out["batch_size"], device)
    judge, right, failed = load_judge(held_out["judge"]), 0, 0
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        try:
            right += judged(judge, prompt, [answer], row)[0] >= held_out["right_from"]
        except JudgeError as error:
            failed += 1
            console.print(f"held-out prompt {row}: {error}", style="red", markup=False)
    return {"right": right, "held_out": len(prompts), "judge_failed": failed}


def run_round(number: int, start: str | Path, folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """One round from the model it starts with; what is there of it is taken as it is."""
    done = folder / "round.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
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
    """The model as it starts."""
    done = folder / "start.json"
    if not done.is_file():
        right = count_right(plan["model_name_or_path"], plan["held_out"], plan["pairs"].get("use_cpu", False))
        _write(done, {"round": 0, "pairs": "", "ties": "", "failed": "", **right})
    return json.loads(done.read_text(encoding="utf-8"))


def show(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table on the console and as CSV, and the figure."""
    table = Table(title="Right answers to held-out prompts")
    for name in ("round", "pairs", "ties", "failed", "right"):
        table.add_column(name, justify="right")
    rates = [100 * row["right"] / row["held_out"] for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        told = f"{row['right']} of {row['held_out']} ({rate:.1f}%)"
        table.add_row(*(str(row[name]) for name in ("round", "pairs", "ties", "failed")), told)
    console.print(table)
    with (folder / "rounds.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    figure, axis = plt.subplots(figsize=(6, 4))
    # The standard error of a share, of the prompts alone.
    errors = [(rate * (100 - rate) / row["held_out"]) ** 0.5 for row, rate in zip(rows, rates, strict=True)]
    axis.errorbar([row["round"] for row in rows], rates, yerr=errors, color="#1f6f8b", marker="o", capsize=3)
    axis.set_xticks([row["round"] for row in rows])
    axis.set_xlabel("round")
    axis.set_ylabel("right answers to held-out prompts, %")
    figure.tight_layout()
    figure.savefig(folder / "rounds.png", dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="YAML file, such as examples/iterate.yaml")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    try:
        plan = read_plan(args.plan)
        folder = Path(plan["output"])
        folder.mkdir(parents=True, exist_ok=True)
        require_same_plan(folder, plan)
        load_judge(plan["held_out"]["judge"])
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    rows = [first_row(folder, plan)]
    start: str | Path = plan["model_name_or_path"]
    for number in range(1, plan["rounds"] + 1):
        console.rule(f"Round {number} of {plan['rounds']}")
        (folder / f"round{number}").mkdir(exist_ok=True)
        rows.append(run_round(number, start, folder / f"round{number}", plan))
        start = folder / f"round{number}" / "model"
    show(rows, folder)
    console.print(f"model       {start}\ntable       {folder / 'rounds.csv'}\nfigure      {folder / 'rounds.png'}")
    return 0


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """A file that is there is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
