"""What a command shows: one line of few numbers a log."""

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import enable_progress_bars
from pretraining_helpers import pretrainer
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from otpo.cli.running.console import OneBar, OneLine, be_quiet, log_line, show_little

ALIGN = {
    "loss": 0.69314,
    "grad_norm": 3.373,
    "learning_rate": 8.333e-07,
    "num_tokens": 7379,
    "rewards/accuracies": 0.375,
    "rewards/margins": 4.826e-05,
    "mean_token_accuracy": 0.5,
    "weights/ess": 0.997,
    "transport/ms": 1.5,
    "epoch": 0.1,
}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (ALIGN, "     20  loss 0.6931  margin 4.83e-05  accuracy 0.38  ess 1.00  norm 3.37  lr 8.33e-07"),
        (
            {"loss": 2.0, "mtp_loss": 3.0, "router/load_entropy": 0.9997, "tokens_per_second": 123639.0, "mfu": 0.3},
            "     20  loss 2.0000  MTP 3.0000  load 1.000  tokens/s 123,639  MFU 0.300",
        ),
        ({"eval_loss": 0.5, "eval_rewards/accuracies": 0.75}, "     20  eval  loss 0.5000  accuracy 0.75"),
        (
            {"eval_ms_loss": 0.5, "eval_th_loss": 0.25},
            "     20  eval ms  loss 0.5000\n     20  eval th  loss 0.2500",
        ),
        ({"loss": float("nan"), "grad_norm": float("inf")}, "     20  loss nan  norm inf"),
        ({"train_runtime": 37.88, "train_loss": 0.693}, "trained 20 steps in 37.9 s, mean loss 0.6930"),
        ({"train_runtime": 3725.0, "train_loss": 1.0}, "trained 20 steps in 1:02:05, mean loss 1.0000"),
        ({"epoch": 1.0}, None),
        ({}, None),
    ],
)
def test_lines(logs, line):
    assert log_line(logs, 20) == line


def test_tokens_a_second_come_from_the_count_of_tokens(capsys, monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("otpo.cli.running.console.time.monotonic", lambda: next(clock))
    shown, state = OneLine(), SimpleNamespace(is_world_process_zero=True, global_step=1)
    for tokens in (7379, 8379):
        shown.on_log(None, state, None, logs={**ALIGN, "num_tokens": tokens})
    first, second = capsys.readouterr().out.splitlines()
    assert "tokens/s" not in first and second.endswith("tokens/s 500")
    shown.on_log(None, SimpleNamespace(is_world_process_zero=False, global_step=1), None, logs={"loss": 1.0})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("no_bar", "theirs", "ours"), [(True, PrinterCallback, OneLine), (False, ProgressCallback, OneBar)]
)
def test_a_training_shows_lines(tmp_path, capfd, no_bar, theirs, ours):
    trainer: Any = pretrainer(tmp_path, max_steps=3, disable_tqdm=no_bar)
    show_little(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(ours) == 1 and theirs not in kinds
    trainer.train()
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if "loss" in line]
    assert len(lines) == 4 and lines[0].split()[:2] == ["1", "loss"] and "{" not in out
    assert lines[-1].startswith("trained 3 steps in")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and "router/dead_experts" in logged[0]  # the state keeps all


def test_what_is_silenced_is_named_exactly():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        be_quiet()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("`torch_dtype` is deprecated", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in caught] == ["`torch_dtype` is deprecated"]


def test_bars_of_weights_and_what_deepspeed_says_of_the_cpu_are_left_out(monkeypatch):
    weights_bar = transformers_logging.is_progress_bar_enabled()
    told: list[str] = []
    logger, handler = logging.getLogger("DeepSpeed"), logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(logger, "filters", [])
    logger.addHandler(handler)
    try:
        for _ in range(2):
            be_quiet()
        assert not transformers_logging.is_progress_bar_enabled() and len(logger.filters) == 1
        logger.warning(
            "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
        )
        logger.warning("Setting accelerator to CPU, since %s", "you said so")
    finally:
        logger.removeHandler(handler)
        enable_progress_bars()
        if weights_bar:
            transformers_logging.enable_progress_bar()
    assert told == ["Setting accelerator to CPU, since you said so"]
