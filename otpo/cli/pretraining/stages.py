"""The stages of a pretraining: which are left to run, what each sets, and how that is told.

What a stage says holds where neither the recipe nor the command line sets the option.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_backbone.pretraining.documents import Stage
from otpo.cli.launching.launch import is_launched
from otpo.cli.running.checkpoints import find_checkpoint

_FINISHED = "stage_finished"
_FIELDS = {
    "max_steps": "steps",
    "sequence_length": "sequence_length",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_scheduler_kwargs": "lr_scheduler_kwargs",
    "warmup_steps": "warmup_steps",
    "per_device_train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Options of the training, and the field of a stage that sets each."""


def plan_stages(
    stages: Sequence[Stage], output_dir: str | None, resume: str | bool | None
) -> list[tuple[Stage, list[str], Path]]:
    """The stages that are still to run, each with its place among them as options, and the file to make after it.

    Args:
        stages: The stages in order; each starts from the model of the one before.
        output_dir: Where their folders are.
        resume: The option `resume_from_checkpoint`: whether finished stages are passed over, and a begun one goes on.

    Raises:
        ValueError: Launched processes can't run several stages; `resume` names a folder; or there are finished stages
            and `resume` is not set.
    """
    # Each stage starts processes of its own and looks for its own checkpoint.
    if is_launched(os.environ):
        raise ValueError(
            f"The mixture has the stages {[stage.name for stage in stages]}, and each needs processes of its own. "
            "Start them one by one with `--stage NAME`, or all with `otpo pretrain --accelerate_config ...`."
        )
    word = str(resume).lower()
    going_on = word in {"true", "yes", "1"}
    if not going_on and word not in {"none", "false", "no", "0", ""}:
        raise ValueError(
            f"`resume_from_checkpoint={resume}` names a folder, but several stages each look for their own. Set it to "
            "true, or run one stage with `--stage`."
        )

    # A file in a stage's folder says that it has finished.
    base = Path(output_dir or "trainer_output")
    folders = [base / f"{number:02d}-{stage.name}" for number, stage in enumerate(stages, start=1)]
    finished = [folder for folder in folders if (folder / _FINISHED).is_file()]
    if finished and not going_on:
        raise ValueError(
            f"`output_dir={base}` holds finished stages ({', '.join(folder.name for folder in finished)}). Set "
            "`resume_from_checkpoint=true` to go on after them, or name another folder."
        )

    # Each stage starts from the folder of the one before, and goes on where it has a checkpoint.
    plan = []
    for place, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
        if folder not in finished:
            words = ["--stage", stage.name, "--output_dir", str(folder)]
            words += ["--resume_from_checkpoint", str(going_on and _has_checkpoint(folder))]
            words += ["--previous_stage", str(folders[place - 1])] if place else []
            plan.append((stage, words, folder / _FINISHED))
    return plan


def stage_settings(stage: Stage, said: Mapping[str, str]) -> dict[str, Any]:
    """The options that a stage sets; see [`otpo.cli.running.command.TrainingCommand.settings`].

    Args:
        stage: The stage.
        said: Options that the recipe or the command line sets. Epochs that are set there are in place of its steps,
            and a schedule that is set there is without its arguments.
    """
    settings = {option: getattr(stage, name) for option, name in _FIELDS.items()}
    if "num_train_epochs" in said:
        del settings["max_steps"]
    if "lr_scheduler_type" in said:  # another schedule needs other arguments
        del settings["lr_scheduler_kwargs"]
    return {option: value for option, value in settings.items() if value is not None}


def describe_stage(stage: Stage, args: Any, said: Mapping[str, str]) -> str:
    """What runs of a stage, and who says so where it could be the stage or the user.

    Args:
        stage: The stage.
        args: The training's options as they run.
        said: Where options were set that the stage does not win over.
    """
    parts = []
    for option, name in _FIELDS.items():
        asked = getattr(stage, name)
        if asked is None:
            continue
        if option == "max_steps" and option not in said and "num_train_epochs" in said:
            option = "num_train_epochs"
        source = f"{said[option]}; the stage says {_short(asked)}" if option in said else "of the stage"
        label = "steps" if option == "max_steps" else option.replace("_", " ")
        parts.append(f"{label} {_short(getattr(args, option))} ({source})")
    return f"{stage.name}: {', '.join(parts)}"


def _short(value: Any) -> str:
    value = getattr(value, "value", value)  # of an enumeration, such as a schedule
    return f"{value:g}" if isinstance(value, float) else str(value)


def _has_checkpoint(folder: Path) -> bool:
    try:
        return find_checkpoint(True, str(folder)) is not None
    except ValueError:
        return False
