"""The YAML of rounds of pairs and alignment, and what keeps two of them out of one folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from otpo.pairs.judges import load_judge

from .rounds import held_out_rows

KEYS = {"output", "rounds", "seed", "model_name_or_path", "pairs", "align", "held_out"}
HELD_OUT = {"dataset_name": None, "dataset_train_split": "train", "judge": None, "right_from": 1.0}
HELD_OUT |= {"max_new_tokens": 256, "batch_size": 32}
SET_HERE = {"model_name_or_path", "dataset_name", "output", "output_dir", "seed", "report"}


def open_plan(path: str) -> tuple[dict[str, Any], Path]:
    """The plan of a file and the folder of its rounds, which is there afterwards.

    Args:
        path: See [`read_plan`].

    Raises:
        ValueError: The plan can't be run, its judge or its held-out prompts can't be loaded, or its folder has the
            rounds of another plan.
        OSError: The file can't be read, or the folder can't be made.
        yaml.YAMLError: It is no YAML.
    """
    plan = read_plan(path)
    load_judge(plan["held_out"]["judge"])
    held_out_rows(plan["held_out"])
    folder = Path(plan["output"])
    folder.mkdir(parents=True, exist_ok=True)
    require_same_plan(folder, plan)
    return plan, folder


def read_plan(path: str) -> dict[str, Any]:
    """The plan of a file, with what `held_out` leaves out.

    Args:
        path: YAML with the keys `output`, `rounds`, `seed` and `model_name_or_path`; with `pairs` and `align`, options
            of these commands; and with `held_out`, the prompts that are answered after each round.

    Raises:
        ValueError: A key is missing, unknown, or set by the rounds themselves; the message names it and the remedy.
        OSError: The file can't be read.
        yaml.YAMLError: It is no YAML.
    """
    plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(plan, dict) or set(plan) != KEYS:
        found = sorted(plan) if isinstance(plan, dict) else type(plan).__name__
        raise ValueError(f"{path} must hold the keys {sorted(KEYS)}, got {found}.")
    if not isinstance(plan["rounds"], int) or plan["rounds"] < 1:
        raise ValueError(f"{path}: `rounds` must be a whole number of at least 1, got {plan['rounds']!r}.")
    for part in ("pairs", "align", "held_out"):
        if not isinstance(plan[part], dict):
            raise ValueError(f"{path}: `{part}` must hold options by name, got {plan[part]!r}.")
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
    """Notes the plan in the folder. More rounds are the same plan, so that a run may be lengthened.

    Raises:
        ValueError: A run of another plan has begun there; the message names the keys that differ.
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
