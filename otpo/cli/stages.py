"""Several stages of a pretraining as runs of their own: a folder for each, and what is left of them to run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_backbone.mixing import Stage

from .command import find_checkpoint
from .launch import is_launched

_FINISHED = "stage_finished"


def plan_stages(
    stages: Sequence[Stage], output_dir: str | None, resume: str | bool | None
) -> list[tuple[list[str], Path]]:
    """The options of each stage that is still to run, and the file to make when it has run.

    Args:
        stages: The stages in order; each starts from the model of the one before.
        output_dir: Where their folders are.
        resume: The option `resume_from_checkpoint`: whether finished stages are passed over, and a begun one goes on.

    Raises:
        ValueError: Launched processes can't run several stages; `resume` names a folder; or there are finished stages
            and `resume` is not set.
    """
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
    base = Path(output_dir or "trainer_output")
    folders = [base / f"{number:02d}-{stage.name}" for number, stage in enumerate(stages, start=1)]
    finished = [folder for folder in folders if (folder / _FINISHED).is_file()]
    if finished and not going_on:
        raise ValueError(
            f"`output_dir={base}` holds finished stages ({', '.join(folder.name for folder in finished)}). Set "
            "`resume_from_checkpoint=true` to go on after them, or name another folder."
        )
    plan = []
    for place, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
        if folder not in finished:
            previous = folders[place - 1] if place else None
            plan.append((_options(stage, folder, previous, going_on), folder / _FINISHED))
    return plan


def _options(stage: Stage, folder: Path, previous: Path | None, going_on: bool) -> list[str]:
    options: dict[str, Any] = {
        "stage": stage.name,
        "output_dir": folder,
        "max_steps": stage.steps,
        "sequence_length": stage.sequence_length,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "warmup_steps": stage.warmup_steps,
        "per_device_train_batch_size": stage.per_device_train_batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "model_name_or_path": previous,
        "resume_from_checkpoint": going_on and _has_checkpoint(folder),
    }
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def _has_checkpoint(folder: Path) -> bool:
    try:
        return find_checkpoint(True, str(folder)) is not None
    except ValueError:
        return False
