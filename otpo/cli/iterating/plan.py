"""The YAML of rounds of pairs and alignment, and what keeps two of them out of one folder."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig

from otpo.cli.pairing.contents import judge_digest, model_digest, rows_digest
from otpo.data.loading import RowArguments, load_rows
from otpo.pairs.judges import load_judge

from .rounds import held_out_rows

CONTENTS = "contents"  # of `iterate.json`, beside the plan's own keys
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
    found = contents_of_plan(plan)
    folder = Path(plan["output"])
    folder.mkdir(parents=True, exist_ok=True)
    require_same_plan(folder, plan, found)
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


def contents_of_plan(plan: Mapping[str, Any]) -> dict[str, str | None]:
    """Digests of what a plan names: rows, judges' files, local models. Rounds that are done are not done again.

    Raises:
        ValueError: Some of it is not there or can't be read.
    """
    pairs, held_out = plan["pairs"], plan["held_out"]
    rows = {"held_out.dataset_name": held_out_rows(held_out)}
    if "dataset_name" in pairs:
        names = ("dataset_name", "dataset_config", "dataset_train_split")
        source = RowArguments(**{name: pairs[name] for name in names if name in pairs})
        rows["pairs.dataset_name"] = load_rows(source, DatasetMixtureConfig(), seed=0, evaluate=False)[0]
    found = {name: rows_digest(read, range(len(read))) for name, read in rows.items()}
    found |= {f"{part}.judge": judge_digest(plan[part].get("judge")) for part in ("pairs", "held_out")}
    models = {"model_name_or_path": plan["model_name_or_path"]}
    for part in ("pairs", "align"):
        models |= {
            f"{part}.{name}": value for name, value in plan[part].items() if name.endswith("model_name_or_path")
        }
        if isinstance(plan[part].get("config"), str) and Path(plan[part]["config"]).is_file():
            found[f"{part}.config"] = hashlib.sha256(Path(plan[part]["config"]).read_bytes()).hexdigest()[:16]
    return {**found, **{name: model_digest(name, value) for name, value in models.items()}}


def require_same_plan(folder: Path, plan: Mapping[str, Any], contents: Mapping[str, str | None]) -> None:
    """Notes the plan in the folder. More rounds are the same plan, so that a run may be lengthened.

    Args:
        folder: Of the rounds.
        plan: From [`read_plan`].
        contents: Of [`contents_of_plan`].

    Raises:
        ValueError: A run of another plan, or of other contents of what it names, has begun there; the message names
            the keys that differ.
    """
    file = folder / "iterate.json"
    told = {name: value for name, value in plan.items() if name not in ("rounds", "output")}
    begun = (folder / "start.json").is_file() or any(folder.glob("round*/*"))
    if file.is_file() and begun:  # without either nothing is lost
        before = json.loads(file.read_text(encoding="utf-8"))
        other = sorted(name for name in told if before.get(name) != told[name])
        if other:
            raise ValueError(
                f"`output: {folder}` has the rounds of another plan, which differs in {other}. Name another folder, "
                f"or remove {folder} to start anew."
            )
        noted = before.get(CONTENTS)
        if noted is None:
            raise ValueError(
                f"`output: {folder}` has rounds of an older otpo, which did not note the contents of "
                f"{sorted(contents)}. So nobody can tell whether they are of what is there now. Name another folder, "
                f"or remove {folder} to start anew."
            )
        changed = sorted(name for name in {**noted, **contents} if noted.get(name) != contents.get(name))
        if changed:
            raise ValueError(
                f"`output: {folder}` has rounds of other contents: what {changed} name has changed since. Put back "
                f"what was there, name another folder, or remove {folder} to start anew."
            )
    file.write_text(json.dumps({**told, CONTENTS: contents}, indent=2) + "\n", encoding="utf-8")
