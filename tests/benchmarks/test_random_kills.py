"""`benchmarks.random_kills` with a training of its own, which is killed and resumed as a real one is."""

import json
import math
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import harness, random_kills
from benchmarks.harness import read_rows
from benchmarks.launching import killing
from benchmarks.launching.commands import Case, Row
from benchmarks.launching.killing import PARTS, differences, phase
from benchmarks.launching.processes import members, start
from otpo.cli.running.identity import RUN_FILE

TRAINING = """
import json, os, subprocess, sys, time
from pathlib import Path
output, fault, resumes = Path(sys.argv[1]), sys.argv[2], "--resume_from_checkpoint" in sys.argv

def save(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    import struct
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + struct.pack("<d", value))

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(0.1)
output.mkdir(parents=True, exist_ok=True)
(output / "RUN").write_text("{}")
done, log, value = 0, [], 1.0
if resumes:
    from_steps = [path for path in output.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    last = max(from_steps, key=lambda path: int(path.name[11:]))
    done = int(last.name[11:])
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    value = log[-1]["value"] + (0.25 if fault == "other weights" else 0)
    if fault == "fails":
        child.kill()
        sys.exit("otpo align: error: can't resume")
for step in range(done + 1, 9):
    value *= 1.5
    log.append({"step": step, "loss": 1 / step, "value": value})
    time.sleep(0.03)
    if step % 2 == 0:
        folder = output / f"checkpoint-{step}"
        save(folder, value)
        time.sleep(0.05)
        (folder / "trainer_state.part").write_text(json.dumps({"global_step": step, "log_history": log}))
        (folder / "trainer_state.part").rename(folder / "trainer_state.json")
save(output, value)
time.sleep(0.1)
child.kill()
"""
ARGUMENTS = ("--engines", "ddp", "--parallel", "4", "--folder")


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Replaces the commands by a training of a second, which has the fault that is named."""
    monkeypatch.setattr(random_kills, "make_materials", lambda folder: folder)
    monkeypatch.setattr(random_kills, "count_gpus", lambda: 0)

    def of(fault: str = "") -> None:
        script = TRAINING.replace('"RUN"', repr(RUN_FILE))

        def words(row, setting, output, port):
            return [sys.executable, "-c", script, str(output), fault]

        monkeypatch.setattr(killing, "command_line", words)

    return of


def run(tmp_path, *arguments):
    output = tmp_path / "kills.csv"
    code = random_kills.main([*ARGUMENTS, str(tmp_path), "--output", str(output), *arguments])
    return code, read_rows(output)


def test_killed_runs_resume_and_are_compared(training, tmp_path, capsys):
    training()
    code, rows = run(tmp_path, "--kills", "12")
    assert code == 0, rows
    assert [row["kill"] for row in rows] == [str(number) for number in range(12)]
    assert set(random_kills.COLUMNS) <= set(rows[0])
    assert {(row["engine"], row["adapter"]) for row in rows} == {("ddp", "full"), ("ddp", "lora")}
    for row in rows:
        assert row["status"] == "ok" and float(row["losses"]) == float(row["weights"]) == 0.0
        assert int(row["killed"]) >= 1 and float(row["moment_s"]) > 0
        before = row["resumed_from"] == "0"
        assert before == (row["phase"] == "before the first checkpoint") or row["phase"] == "while saving a checkpoint"
    assert len({row["phase"] for row in rows}) >= 2
    assert "12 of 12 resumed to the uninterrupted trajectory" in capsys.readouterr().out

    # What is done is not done again; the same number of other engines is another kill.
    training("fails")
    assert run(tmp_path, "--kills", "12") == (0, rows)
    code, others = run(tmp_path, "--kills", "4", "--engines", "ddp/lora")
    assert len(others) == 4 and {row["adapter"] for row in others} == {"lora"} and others[0] != rows[0]


def test_rows_that_are_kept_are_judged_by_the_factor_of_this_run(tmp_path):
    [draw] = random_kills.draw_kills([Row(Case("align", "compass", "lora"), "ddp")], 1, 0)
    about, path = {"steps": 8, "date": "today"}, tmp_path / "kills.csv"
    numbers = {
        "losses": 1e-6,
        "weights": 0.0,
        "noise_losses": 2e-7,
        "noise_weights": 0.0,
        "status": "ok",
        "reason": "",
    }
    row = random_kills.describe_draw(draw) | {"steps": 8, "date": "yesterday"} | numbers
    harness.write_rows(path, [row])
    kept = [random_kills.kept_rows(path, about, [draw], factor)[0]["status"] for factor in (10, 1)]
    assert kept == ["ok", "differs"]
    assert random_kills.kept_rows(path, about, [draw._replace(share=0.5)], 10) == {}
    assert random_kills.kept_rows(path, about | {"steps": 9}, [draw], 10) == {}


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("other weights", "differs", "another trajectory"),
        ("fails", "failed", "exit code 1: can't resume"),
    ],
)
def test_a_resumed_run_that_is_another_one_is_told(training, tmp_path, fault, status, reason):
    training(fault)
    code, rows = run(tmp_path, "--kills", "8", "--seed", "3")
    resumed = [row for row in rows if row["resumed_from"] not in ("", "0")]
    assert code == 1 and resumed
    assert {(row["status"], row["reason"]) for row in resumed} == {(status, reason)}
    assert all(row["status"] == "ok" for row in rows if row["resumed_from"] == "0")


def test_all_processes_of_a_command_are_killed(training, tmp_path):
    words = [sys.executable, "-c", "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "]
    words[-1] += "'import time; time.sleep(60)'], start_new_session=True); print(1, flush=True); time.sleep(60)"
    started = start(words, tmp_path / "log")
    while not (tmp_path / "log").read_text():
        assert started.process.poll() is None
    assert len(members(started.mark)) == 2
    assert killing.kill(started) >= 2 and not members(started.mark)


def test_draws_are_of_the_seed_and_of_all_parts():
    rows = [Row(Case("align", "compass", adapter), "ddp") for adapter in ("full", "lora")]
    draws = random_kills.draw_kills(rows, 200, 0)
    assert draws == random_kills.draw_kills(rows, 200, 0) != random_kills.draw_kills(rows, 200, 1)
    parts = Counter(draw.part for draw in draws)
    assert set(parts) == set(PARTS) and parts["training"] > 80 and min(parts.values()) > 25
    assert all(0 <= draw.share < 1 for draw in draws) and draws[3].row == rows[1]


def test_engines_that_cannot_run_are_left_out(capsys):
    names = [row.engine for row in random_kills.chosen_rows(random_kills.KINDS, 0)]
    assert "fsdp2" not in names and names.count("experts-zero3") == 2
    assert [row.case.adapter for row in random_kills.chosen_rows(["fsdp2/lora"], 2)] == ["lora"]
    assert not random_kills.chosen_rows(["ddp"], 1)
    assert random_kills.main(["--engines", "nothing"]) == 2 and "experts-zero1" in capsys.readouterr().out


def test_what_a_kill_has_left(tmp_path):
    assert phase(tmp_path, 4) == "before the first checkpoint"
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"w": torch.ones(1)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert phase(tmp_path, 4) == "while saving a checkpoint"
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        assert phase(tmp_path, 4) == ("between checkpoints" if step == 2 else "after the last checkpoint")


def test_differences_of_results():
    left = ({1: 0.5, 2: 0.25}, {"w": torch.tensor([1.0, 2.0]), "empty": torch.zeros(0)})
    assert differences(left, ({1: 0.5, 2: 0.5}, {**left[1], "w": torch.tensor([1.0, 1.0])})) == (0.25, 1.0)
    assert differences(left, ({1: 0.5}, left[1])) == (math.inf, math.inf)
    assert differences(left, (left[0], {"w": left[1]["w"]})) == (math.inf, math.inf)
    assert math.isnan(differences(left, ({1: math.nan, 2: 0.25}, left[1]))[0])
