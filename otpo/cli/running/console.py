"""What a training command shows while it trains: one bar with the time left, and one line of few numbers a log.

All numbers go to the trackers and to `trainer_state.json` in any case. `--verbose` shows them here too.
"""

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

SHOWN = (
    ("loss", "loss", ".4f"),
    ("mtp_loss", "MTP", ".4f"),
    ("rewards/margins", "margin", ".3g"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("mean_token_accuracy", "token accuracy", ".3f"),
    ("weights/ess", "ess", ".2f"),
    ("router/load_entropy", "load", ".3f"),
    ("grad_norm", "norm", ".3g"),
    ("learning_rate", "lr", ".2e"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("mfu", "MFU", ".3f"),
)
"""Numbers of a log by their keys, what they are called here, and how they are written."""
_LEFT_OUT = {"mean_token_accuracy": "rewards/accuracies"}  # where the other one is there
# What transformers says of names that users may still set, and that TRL calls itself.
_QUIET = ("`gradient_checkpointing", "`is_gradient_checkpointing` is deprecated")
# What DeepSpeed, where it is installed, says in each process without a GPU, whether anything uses it or not.
_NO_NEWS = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


def log_line(logs: Mapping[str, Any], step: int, speed: float | None = None) -> str | None:
    """One line of a log; None for one that has none of the numbers that are shown.

    Args:
        logs: What a trainer logs. Numbers of an evaluation have names that begin with `eval_`.
        step: Steps that were made.
        speed: Tokens a second, where the log does not tell.
    """
    if "train_runtime" in logs:
        return f"trained {step} steps in {_duration(logs['train_runtime'])}, mean loss {logs['train_loss']:.4f}"
    evaluated = [key.removesuffix("_loss") for key in logs if key.startswith("eval") and key.endswith("_loss")]
    if evaluated:
        lines = [_numbers(logs, f"{name}_") for name in evaluated]
        return "\n".join(
            f"{step:>7}  {name.replace('_', ' ', 1)}  {line}" for name, line in zip(evaluated, lines, strict=True)
        )
    known = dict(logs) if speed is None else {"tokens_per_second": speed, **logs}
    line = _numbers(known, "")
    return f"{step:>7}  {line}" if "loss" in logs else None


def _numbers(logs: Mapping[str, Any], prefix: str) -> str:
    shown = []
    for key, name, form in SHOWN:
        value = logs.get(f"{prefix}{key}")
        if isinstance(value, int | float) and f"{prefix}{_LEFT_OUT.get(key)}" not in logs:
            shown.append(f"{name} {value:{form}}")
    return "  ".join(shown)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}"


class _Speed:
    """Tokens a second between two logs, of the count of all tokens that TRL keeps."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None

    def of(self, logs: Mapping[str, Any]) -> float | None:
        if "num_tokens" not in logs or "loss" not in logs:
            return None
        now, before = (float(logs["num_tokens"]), time.monotonic()), self._before
        self._before = now
        return None if before is None or now[1] <= before[1] else (now[0] - before[0]) / (now[1] - before[1])


class OneBar(ProgressCallback):
    """transformers' bar, over which each log stands in a line."""

    def __init__(self) -> None:
        super().__init__()
        self._speed = _Speed()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes the line above the bar."""
        line = log_line(logs or {}, state.global_step, self._speed.of(logs or {}))
        if state.is_world_process_zero and self.training_bar is not None and line is not None:
            self.training_bar.write(line)


class OneLine(TrainerCallback):
    """The lines alone, where `disable_tqdm` asks for no bar."""

    def __init__(self) -> None:
        self._speed = _Speed()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints the line."""
        line = log_line(logs or {}, state.global_step, self._speed.of(logs or {}))
        if state.is_world_process_zero and line is not None:
            Console(soft_wrap=True).print(line, highlight=False, markup=False)


def show_little(trainer: Any) -> None:
    """Puts [`OneBar`] and [`OneLine`] in the place of transformers' callbacks, where a trainer has those."""
    for theirs, ours in ((ProgressCallback, OneBar), (PrinterCallback, OneLine)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())


def be_quiet() -> None:
    """Leaves out what is no news: deprecated names that TRL still calls, bars of weights that are read and written."""
    for message in _QUIET:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("DeepSpeed")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    if not sys.stderr.isatty():  # of maps over rows, of which a file would hold hundreds of states
        disable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS)
