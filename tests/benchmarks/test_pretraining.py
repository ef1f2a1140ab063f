"""Variants of one command get times where their losses agree, on the CPU with a tiny model."""

import pytest

from benchmarks import harness, pretraining
from benchmarks.pretraining import GROUPED, judged, line, main

SHORT = ["--shapes", "compass-tiny", "--warmup", "1", "--steps", "2", "--profiled", "1"]


@pytest.mark.lengthy
def test_commands_are_timed_as_they_are_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(pretraining.VARIANTS, "other_rate", ["--router_aux_loss_coef", "no number"])
    path = tmp_path / "pretraining.csv"
    assert main([*SHORT, "--variants", GROUPED, "memcpy", "other_rate", "--output", str(path)]) == 1
    grouped, memcpy, failed = harness.read_rows(path)
    for row in (grouped, memcpy):
        assert row["status"] == "ok" and float(row["tokens_per_s"]) > 0 and 0 < float(row["idle_share"]) < 1
        assert len(row["step_ms"].split()) == 2 and row["mfu"] == row["peak_mib"] == ""
        # About 2 rows of 128 tokens in the time of a step.
        assert float(row["tokens_per_s"]) * float(row["ms"]) / 1e3 == pytest.approx(256, rel=0.5)
        assert row["command"].startswith("otpo pretrain --tokenizer_name_or_path DATA/")
    assert float(grouped["loss"]) == pytest.approx(float(memcpy["loss"]), rel=1e-5)
    assert failed["status"].startswith("failed: ") and failed["ms"] == ""
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "other_rate" in capsys.readouterr().out


def test_who_learns_something_else_has_no_time():
    row = dict.fromkeys(pretraining.COLUMNS, "") | {"status": "ok", "first_loss": 6.0, "loss": 4.0, "ms": 1.0}
    row |= {
        "first_norm": 2.0,
        "shape": "a",
        "variant": GROUPED,
        "idle_share": 0.1,
        "first_step_s": 1.0,
        "tokens_per_s": 100,
    }
    first = judged(dict(row), None)
    assert first["speedup"] == 1.0
    close = judged({**row, "loss": 4.01, "tokens_per_s": 150}, first)
    assert close["speedup"] == 1.5 and close["learnt_error"] == pytest.approx(0.005) and "1.5 x" in line(close)
    for loss in (4.2, 3.8, float("nan")):
        wrong = judged({**row, "loss": loss}, first)
        assert wrong["status"].startswith("wrong: ") and wrong["ms"] == wrong["tokens_per_s"] == ""
    other = judged({**row, "first_loss": 6.01, "loss": 4.01}, first)
    assert other["status"].startswith("wrong: the first loss is off by 1.7e-03") and other["ms"] == ""
    steep = judged({**row, "first_norm": 2.2}, first)
    assert steep["status"].startswith("wrong: the norm of the first gradients is off by 1.0e-01")
    chaotic = judged({**row, "shape": "compass-v3-width"}, None)
    for loss, right in ((4.5, True), (5.0, False)):  # 2.0 is to be learnt
        assert (judged({**row, "shape": "compass-v3-width", "loss": loss}, chaotic)["status"] == "ok") == right
    lost = judged(dict(row), wrong)
    assert lost["status"].startswith("nothing to compare with, grouped_mm: wrong")


@pytest.mark.lengthy
def test_half_the_learning_rate_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining.VARIANTS, "half", ["--learning_rate", "1.5e-4"])
    path = tmp_path / "pretraining.csv"
    assert main([*SHORT, "--variants", GROUPED, "half", "--output", str(path)]) == 1
    grouped, half = harness.read_rows(path)
    assert grouped["status"] == "ok" and half["status"].startswith("wrong: ") and half["tokens_per_s"] == ""


@pytest.mark.lengthy
def test_transformers_class_has_the_same_first_loss(tmp_path, monkeypatch):
    plain = ["--preset", "compass-tiny", "--config_overrides", "num_mtp_layers=0,num_shared_experts=0"]
    sizes = ["--sequence_length", "128", "--per_device_train_batch_size", "2"]
    monkeypatch.setitem(pretraining.SHAPES, "compass-tiny", [*plain, *sizes])
    path = tmp_path / "pretraining.csv"
    assert main([*SHORT, "--steps", "3", "--variants", GROUPED, "transformers", "--output", str(path)]) == 0
    ours, theirs = harness.read_rows(path)
    assert theirs["status"] == "ok" and float(theirs["tokens_per_s"]) > 0
    assert float(theirs["first_loss"]) == pytest.approx(float(ours["first_loss"]), rel=1e-6)
    assert theirs["command"].startswith("transformers' class and Trainer, with the options of otpo pretrain")
