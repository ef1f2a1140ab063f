"""The JSON report of a run, for committed results."""

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from otpo import __version__
from otpo.cli.launching.engine import count_parameters, describe_device, describe_engine


def last_metrics(log_history: list[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The last training step's, the summary's and the last evaluation's entries of a trainer's log; None if absent."""
    marks = {"train": "loss", "summary": "train_runtime", "eval": "eval_loss"}
    return {
        name: next((entry for entry in reversed(log_history) if mark in entry), None) for name, mark in marks.items()
    }


def make_report(
    trainer: Any, options: dict[str, Any], seconds: float, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a run was and what came out of it.

    Args:
        trainer: A `transformers.Trainer` after training.
        options: The options that differ from the defaults.
        seconds: Duration of the whole command.
        extra: Entries of this kind of training.
    """
    total, trainable = count_parameters(trainer.model)
    return {
        "metrics": last_metrics(trainer.state.log_history),
        "steps": trainer.state.global_step,
        "options": options,
        **(extra or {}),
        "parameters": {"total": total, "trainable": trainable},
        "device": describe_device(trainer.accelerator.device),
        "engine": describe_engine(trainer.accelerator),
        "versions": {"python": platform.python_version(), "otpo": __version__, **_versions()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def write_report(path: str, report: dict[str, Any]) -> None:
    """Writes a report as indented JSON, making the folder where needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
