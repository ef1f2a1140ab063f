"""`benchmarks.launch_matrix`: the table's rows, one that is run, what is wrong, and a matrix that goes on."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import launch_matrix
from benchmarks.harness import read_rows
from benchmarks.launching import commands
from benchmarks.launching.commands import ENGINES, SINGLE, Case, Row, Setting, all_rows, command_line
from benchmarks.launching.processes import last_line

ROW = Row(Case("align", "qwen3", "full"), "ddp")
OTHERS = tuple(name for name in ENGINES if name not in (SINGLE, "ddp"))
STAND_IN = """
import json, sys
from pathlib import Path
output, losses, code = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
if code:
    sys.exit(print("otpo align: error: `fsdp` can't do this. Leave it out.") or code)
(output / "checkpoint-4").mkdir(parents=True)
log = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
(output / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Commands that write the losses that a test says, in place of a training; a number is an exit code."""
    monkeypatch.setattr(launch_matrix, "make_materials", lambda folder: folder)

    def of(losses: dict[str, list[float] | int]):
        started = []

        def words(row, setting, output, port=0):
            started.append(row.name) if port else None
            said = losses[row.engine]
            code = said if isinstance(said, int) else 0
            return [sys.executable, "-c", STAND_IN, str(output), json.dumps(said), str(code)]

        monkeypatch.setattr(launch_matrix, "command_line", words)
        return started

    return of


def run(path: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = launch_matrix.main(["--output", str(path), "--rows", "align/qwen3/full", "--parallel", "3", *arguments])
    return code, {row["engine"]: row for row in read_rows(path)}


@pytest.mark.lengthy
def test_a_row_is_run_and_compared(tmp_path, capsys):
    code = launch_matrix.main(["--output", str(tmp_path / "m.csv"), "--rows", ROW.name, "align/qwen3/full/fsdp2"])
    rows = {row["engine"]: row for row in read_rows(tmp_path / "m.csv")}
    assert code == 0 and set(rows) == {SINGLE, "ddp", "fsdp2"}
    ddp = rows["ddp"]
    assert ddp["status"] == rows[SINGLE]["status"] == "ok" and float(ddp["difference"]) <= 1e-4
    assert set(launch_matrix.COLUMNS) <= set(ddp) and len(ddp["losses"].split()) == 4
    assert ddp["single"] == rows[SINGLE]["losses"] and len(set(ddp["losses"].split())) == 4  # it learns
    assert ddp["typed"].startswith("otpo align --model_name_or_path MATERIALS/qwen3 ")
    assert "--num_processes 2" in ddp["typed"] and str(tmp_path) not in ddp["typed"]
    fsdp = rows["fsdp2"]
    assert fsdp["status"] in ("not run", "ok")
    if fsdp["status"] == "not run":
        assert fsdp["reason"] == "needs two GPUs; here are none" and not fsdp["losses"]
    assert "ok       align/qwen3/full/ddp" in capsys.readouterr().out


def test_wrong_losses_refusals_and_failures_are_told(tmp_path, stand_in, monkeypatch, capsys):
    for name in ("zero1", "zero2", "zero3", "fsdp2", "device-map"):
        monkeypatch.setitem(ENGINES, name, ENGINES["ddp"])
    right = [0.7, 0.6, 0.5, 0.4]
    started = stand_in(
        {
            **{SINGLE: right, "ddp": [0.7, 0.6, 0.5, 0.40005], "zero1": [0.7, 0.6002, 0.5, 0.4], "zero2": 2},
            **{"zero3": 1, "fsdp2": [0.7, float("nan"), 0.5, 0.4], "device-map": [0.7]},
        }
    )
    code, rows = run(tmp_path / "m.csv")
    assert code == 1 and len(started) == 7
    assert {name: row["status"] for name, row in rows.items()} == {
        **{SINGLE: "ok", "ddp": "ok", "zero1": "differs", "zero2": "refused", "zero3": "failed"},
        **{"fsdp2": "differs", "device-map": "failed"},
    }
    assert rows["zero2"]["reason"] == "`fsdp` can't do this. Leave it out."
    assert rows["zero3"]["reason"] == "exit code 1: `fsdp` can't do this. Leave it out."
    assert rows["device-map"]["reason"] == "it logged 1 losses in 4 steps"
    assert float(rows["zero1"]["difference"]) == 2e-4 and rows["fsdp2"]["difference"] == "nan"
    assert (tmp_path / "m" / "align_qwen3_full_zero3.log").is_file()
    assert "differs  align/qwen3/full/zero1" in capsys.readouterr().out

    # What failed is run again, and what is done is not; a refusal is done.
    started.clear()
    code, again = run(tmp_path / "m.csv")
    assert sorted(started) == ["align/qwen3/full/device-map", "align/qwen3/full/zero3"] and code == 1
    assert again["zero1"] == rows["zero1"]
    started.clear()
    run(tmp_path / "m.csv", "--steps", "5")  # another matrix
    assert len(started) == 7


def test_rows_wait_for_their_single_process_and_fail_with_it(tmp_path, stand_in):
    stand_in({SINGLE: 1, "ddp": [0.7, 0.6, 0.5, 0.4]})
    _, rows = run(tmp_path / "m.csv")
    assert rows["ddp"]["status"] == "failed"
    assert rows["ddp"]["reason"] == "the single process, which it is compared with, was failed"


def test_rows_that_are_kept_are_judged_by_the_bound_of_this_run(tmp_path, stand_in):
    stand_in({SINGLE: [1.0, 2.0, 3.0, 4.0], "ddp": [1.0, 2.0, 3.0, 4.05]} | dict.fromkeys(OTHERS, 2))
    assert run(tmp_path / "m.csv", "--bound", "0.1")[1]["ddp"]["status"] == "ok"
    started = stand_in({})
    code, rows = run(tmp_path / "m.csv", "--bound", "1e-3")
    assert (code, rows["ddp"]["status"], rows["ddp"]["bound"], started) == (1, "differs", "0.001", [])
    assert run(tmp_path / "m.csv", "--bound", "0.1")[1]["ddp"]["status"] == "ok"


def test_rows_that_are_not_reached_say_so(tmp_path, stand_in):
    started = stand_in({SINGLE: 1})
    code, rows = run(tmp_path / "m.csv", "--minutes", "0")
    assert code == 1 and not started
    assert rows[SINGLE]["reason"] == "not reached within 0 minutes" and rows[SINGLE]["status"] == "not run"


def test_a_row_that_hangs_is_ended(tmp_path, stand_in, monkeypatch):
    stand_in({})
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(launch_matrix, "command_line", lambda *_: words)
    code = launch_matrix.main(
        ["--output", str(tmp_path / "m.csv"), "--rows", "align/qwen3/full/single", "--patience", "0.2"]
    )
    (row,) = read_rows(tmp_path / "m.csv")
    assert code == 1 and row["status"] == "failed" and row["reason"] == "no end after 0.2 s"


def test_the_table_has_each_engine_with_each_kind_of_model():
    names = [row.name for row in all_rows()]
    assert len(names) == len(set(names)) and [row.engine for row in all_rows()[: len(commands.CASES)]] == [
        SINGLE
    ] * len(commands.CASES)
    for model in ("compass", "mixtral", "qwen3_moe"):
        assert f"align/{model}/full/fsdp2" in names and f"align/{model}/full/experts-zero3" in names
    assert "align/compass/lora/experts-transformers" in names
    assert "align/qwen3/full/experts-zero1" not in names  # nothing to spread


def test_each_row_is_a_command_line_that_its_parser_and_the_launcher_read(tmp_path):
    from otpo.cli import align, pretrain, sft
    from otpo.cli.launching.launch import check_options
    from otpo.cli.options.run_options import read_command_line

    setting = Setting(tmp_path, on_gpus=True, bf16=False, steps=4, save_steps=4)
    parsers = {"align": align.make_parser(), "sft": sft.make_parser(), "pretrain": pretrain.make_parser()}
    for row in all_rows():
        words = command_line(row, setting, tmp_path / "out", port=29_511)
        own = words[words.index("-m", words.index("-m") + 1) + 2 :] if "accelerate" in words[2] else words[4:]
        given = read_command_line(parsers[row.case.command], own)
        check_options(given.launcher, row.case.command)
        values = given.values
        assert values["max_steps"] == 4 and values["bf16"] is False, row.name
        assert (values["expert_parallel_size"] == 2) == row.engine.startswith("experts-"), row.name
        assert values["gradient_accumulation_steps"] == (2 if ENGINES[row.engine].processes == 1 else 1), row.name
        if row.engine.startswith("experts-zero"):
            stage = row.engine[-1]
            assert f"zero{stage}" in words or words[words.index("--zero_stage") + 1] == stage


def test_the_last_line_is_the_commands_own(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\notpo sft: error: what\nTraceback\n")
    assert last_line(log, "sft") == "what" and last_line(log, "align") == "Traceback"
    log.write_text("")
    assert last_line(log, "sft") == "no output"
