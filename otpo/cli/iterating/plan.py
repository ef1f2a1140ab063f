"""The YAML of rounds of pairs and alignment, and what keeps two of them out of one folder."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig

from otpo.cli.align import make_parser as align_parser
from otpo.cli.launching.launch import check_options
from otpo.cli.options.preflight import check_options_alone
from otpo.cli.options.run_options import read_command_line
from otpo.cli.pairing.contents import judge_digest, model_digest, rows_digest
from otpo.cli.pairing.options import make_parser as pairs_parser
from otpo.data.loading import RowArguments, load_rows
from otpo.pairs.judges import load_judge

from .rounds import held_out_rows
from .steps import words_of

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
    require_options(plan)
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
    _require_values(plan, path)
    return plan


def require_options(plan: Mapping[str, Any]) -> None:
    """Reads the options of `pairs` and `align` as these commands do, so that a slip costs no round.

    Raises:
        ValueError: An option is not known, or its value can't be used.
        SystemExit: Likewise, as the command itself says it.
    """
    named = {"model_name_or_path": plan["model_name_or_path"], "output": "pairs.jsonl", "seed": plan["seed"]}
    parser = pairs_parser()
    given = read_command_line(parser, words_of({**named, **plan["pairs"]}))
    if given.launcher:
        raise ValueError(f"`pairs` has options that `otpo pairs` does not know: {' '.join(given.launcher)}.")
    parser.parse_args_into_dataclasses(given.arguments, look_for_args_file=False)
    named = {"model_name_or_path": plan["model_name_or_path"], "dataset_name": "pairs.jsonl", "seed": plan["seed"]}
    given = read_command_line(align_parser(), words_of({**named, "output_dir": "model", **plan["align"]}))
    check_options_alone(given.values)
    check_options([*given.recipe_launcher, *given.launcher], "align")


def _require_values(plan: Mapping[str, Any], path: str) -> None:
    """Raises a `ValueError` unless what the rounds themselves read is of its kind."""
    values = {**plan, **{f"held_out: {name}": value for name, value in plan["held_out"].items()}}
    texts = ("output", "model_name_or_path", "held_out: dataset_name", "held_out: dataset_train_split")
    for name in (*texts, "held_out: judge"):
        value = values[name]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}: `{name}` must be text, got {value!r}.")
    least = {"rounds": 1, "seed": 0, "held_out: max_new_tokens": 1, "held_out: batch_size": 1}
    for name, low in least.items():
        value = values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{path}: `{name}` must be a whole number of at least {low}, got {value!r}.")
    right = values["held_out: right_from"]
    if not isinstance(right, (int, float)) or isinstance(right, bool) or not math.isfinite(right):
        raise ValueError(f"{path}: `held_out: right_from` must be a score, a finite number, got {right!r}.")


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
