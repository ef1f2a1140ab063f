"""How a run of several processes ends that fails: with one line of ours, which says what failed first."""

import json
import signal
from pathlib import Path

import pytest
import torch
from cli_helpers import ROOT, arguments, python
from datasets import Dataset
from helpers import save_model
from transformers import AutoModelForCausalLM

from otpo.cli.launching import failures, launch
from otpo.cli.launching.failures import Failure, came_later, note, noted, outcome
from otpo.cli.running.command import refuse

REFUSED, FAULT = Failure(0, 1.0, 0, "no", True), Failure(0, 2.0, 1, "ValueError: bad", False)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """This process as rank 3 of a launcher of ours."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(failures.FOLDER, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("failed", "code", "rank", "line", "ends_with"),
    [
        ([REFUSED], 2, 0, "no", 2),
        ([REFUSED._replace(rank=1)], 2, 1, "the process of rank 1: no", 2),
        ([FAULT], 1, 1, "the process of rank 1: ValueError: bad", 1),
        ([FAULT], 1, None, "ValueError: bad", 1),
        ([FAULT, FAULT._replace(rank=0, time=3.0)], 1, 0, "the process of rank 1: ValueError: bad", 1),
        ([FAULT], -signal.SIGTERM, 1, "the process of rank 1: ValueError: bad", 1),  # the launcher was quicker
        ([FAULT], -signal.SIGABRT, 1, "the process of rank 1: ValueError: bad", 1),  # a library's end of a process
        ([FAULT], -signal.SIGSEGV, 0, "the process of rank 0 was ended by SIGSEGV", -signal.SIGSEGV),
        ([], -signal.SIGKILL, None, "the process was ended by SIGKILL, as the system does where memory runs out", -9),
        ([], 3, 2, "the process of rank 2 ended with exit code 3; what it said stands above", 3),
        ([], -signal.SIGTERM, 0, None, -signal.SIGTERM),
    ],
)
def test_the_last_line(failed, code, rank, line, ends_with):
    assert outcome(failed, code, rank) == (line, ends_with)


def test_a_failure_is_noted_for_both_launchers(launched, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "torch"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    error = ValueError("hf_token=hf_abcdefghijklmnopqrstuvwxyz0123456789")
    failure = note("a line", error, refused=False)
    assert failure is not None and noted(launched) == [failure] and not came_later(failure)
    assert failure == (2, failure.time, 3, "a line", False)
    told = json.loads((tmp_path / "torch").read_text())["message"]
    assert told["message"] == "a line" and int(told["extraInfo"]["timestamp"]) == int(failure.time)
    assert "ValueError" in told["extraInfo"]["py_callstack"] and "hf_abc" not in told["extraInfo"]["py_callstack"]


def test_the_first_failure_of_the_last_attempt_counts(launched):
    for name, failure in (("a", FAULT), ("b", FAULT._replace(time=1.5)), ("c", FAULT._replace(attempt=1, time=9.0))):
        (launched / f"{name}.json").write_text(json.dumps(failure._asdict()))
        assert came_later(FAULT) is (name != "a")
    (launched / "torn.json").write_text("{")
    assert [failure.time for failure in noted(launched)] == [9.0]
    assert noted(launched / "nowhere") == []


def test_what_cannot_be_noted_is_said(launched, monkeypatch, capsys):
    assert refuse("otpo align", ValueError("`a=1`")) == 2
    assert capsys.readouterr().err == "" and noted(launched)[0].message == "`a=1`"
    monkeypatch.setattr("otpo.cli.running.command._LAST_WORD", 0.0)
    for folder in (str(launched / "nowhere"), ""):
        monkeypatch.setenv(failures.FOLDER, folder)
        assert refuse("otpo align", ValueError("`a=1`")) == 2
        assert capsys.readouterr().err == "otpo align: error: the process of rank 3: `a=1`\n"


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("refusal", 2, "the process of rank 1: `option=3` can't be used. Set 4."),
        ("fault", 1, "the process of rank 1: RuntimeError: of 1"),
        ("killed", 137, "the process of rank 1 was ended by SIGKILL, as the system does where memory runs out"),
        ("exit", 3, " ended with exit code 3; what it said stands above"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_launch_ends_with_it(kind, code, line, own_process, monkeypatch, capfd):
    monkeypatch.setattr(launch, "module_of", lambda command: "failing_worker")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    verbose = kind == "fault"
    assert launch.launch(["--num_processes", "2"], "align", [kind], use_cpu=True, verbose=verbose) == code
    said = capfd.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("otpo align: error: the process of rank ") and last.endswith(line)
    assert ("Root Cause" in said) is verbose and "Traceback" not in said


@pytest.mark.lengthy
def test_a_row_that_one_of_two_processes_meets(model_folder, tokenizer, pairs_file, tmp_path):
    """Its own trace, a line of the other process, and at the end what is wrong with which row."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~").input_ids] = float("nan")
    broken = save_model(model, tmp_path / "broken", tokenizer)
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    rows[5]["chosen"][0]["content"] += " ~"
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    argv = arguments(broken, str(tmp_path / "rows.jsonl"), tmp_path / "out", max_steps=len(rows))
    done = python("-m", "otpo", "align", *argv, "--num_processes", "2")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("otpo align: error: the process of rank ")
    assert "FloatingPointError" in last and "(row(s) 5 of the training dataset)" in last and "learning_rate" in last
    assert done.stderr.count("Traceback") == 1 and "ChildFailedError" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))
