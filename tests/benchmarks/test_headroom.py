"""`benchmarks.headroom` at its smallest: two rounds on a random model, taken up again, and its numbers by hand."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time

import datasets
import headroom_helpers
import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.headroom import __main__ as headroom
from benchmarks.headroom import worker
from benchmarks.headroom.plan import (
    HELD_OUT,
    TASKS,
    Job,
    Plan,
    held_out_prompts,
    jobs_of,
    result_path,
    training_prompts,
)
from benchmarks.headroom.processes import devices_of, run_jobs
from benchmarks.headroom.report import cell_rows, headroom_line, markdown, read_cells, summary_rows, write_report
from otpo.data.constraints.checks import check_constraints

SMALL = ["--seeds", "2", "--prompts", "6", "--samples", "4", "--held_out", "8", "--tokens", "6", "--use_cpu"]
SET = ["--set", "max_steps=1", "per_device_train_batch_size=2", "learning_rate=0.01", "warmup_steps=0"]


@pytest.fixture
def loud():
    """The command leaves no logger silenced."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def start(model_folder, tokenizer, tmp_path_factory):
    """A random model whose answers many tokens end."""
    folder = tmp_path_factory.mktemp("start")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 50)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("own_process", "loud")
def test_two_rounds_and_going_on(start, tmp_path, monkeypatch, capsys):
    # A random model keeps no constraint, so here letters count.
    monkeypatch.setattr(
        worker, "load_judge", lambda name: lambda prompt, answers, row: [1.0 + len(a) for a in answers]
    )
    monkeypatch.setattr(worker, "is_right", lambda row, answer: len(answer) % 2 == 0)
    output = tmp_path / "run"
    asked = ["--task", "constraints", "--model", start, "--output", str(output), *SMALL, *SET]
    assert headroom.main([*asked, "--weightings", "dpo", "contrast", "diff"]) == 0
    told = capsys.readouterr().out
    assert "The start gets" in told and "`contrast`" in told and "GPU hours" in told
    with (output / "headroom_constraints.csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = {(row["weighting"], row["seed"], row["round"]) for row in rows}
    assert cells == {("start", "", "0")} | {
        (name, seed, number) for name in ("dpo", "contrast", "diff") for seed in "01" for number in "12"
    }
    assert all(row["prompts"] == ("8" if row["held_out"] == "all" else "4") for row in rows)
    assert (output / "headroom_constraints.png").stat().st_size > 5_000

    # The first round's pairs are shared; later ones are a weighting's own, and the weights moved.
    first = {row["pair"] for row in rows if (row["seed"], row["round"], row["held_out"]) == ("0", "1", "all")}
    assert len(first) == 1

    # A cell that is there is not run again; one that is missing is, and is the same.
    cell = output / "cells" / "contrast_seed1.json"
    before, kept = json.loads(cell.read_text()), (output / "cells" / "dpo_seed0.json").stat().st_mtime_ns
    cell.unlink()
    assert headroom.main([*asked, "--weightings", "dpo", "contrast", "diff"]) == 0
    after = json.loads(cell.read_text())
    assert [one["held_out"] for one in after["rounds"]] == [one["held_out"] for one in before["rounds"]]
    assert (output / "cells" / "dpo_seed0.json").stat().st_mtime_ns == kept

    # Another plan in the same folder is refused, another weighting is not.
    assert headroom.main([*asked, "--samples", "3"]) == 2
    assert "differs in ['samples']" in capsys.readouterr().out
    assert headroom.main([*asked, "--weightings", "budget", "--seeds", "1"]) == 0
    assert headroom.main([*asked, "--report"]) == 0


@pytest.mark.lengthy
@pytest.mark.usefixtures("own_process", "loud")
def test_several_processes_and_jobs_that_fail(start, tmp_path, small_plan):
    plan = dataclasses.replace(small_plan, model=start, output=str(tmp_path))
    said: list[str] = []
    failures = run_jobs(plan, jobs_of(plan), ["", ""], said.append)
    # The checkers find no right answer of a random model, so no pair can be aligned on.
    assert [failure.job for failure in failures] == [Job("cell", 0, "dpo")]
    assert "0 pairs are fewer than a batch of 2. Raise `--prompts`" in failures[0].reason
    assert (tmp_path / "cells" / "pairs_seed0.json").is_file() and len(said) == 3
    (tmp_path / "runs.jsonl").write_text('{"seconds": 36, "gpus": 2, "processes": 2, "device": "some"}\n')
    assert "0.02 GPU hours" in write_report(plan)


@pytest.fixture
def small_plan(tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 2}
    weightings = {"dpo": {"weighting": "uniform"}}
    return Plan(
        "constraints",
        "",
        str(tmp_path),
        weightings,
        (0,),
        1,
        prompts=2,
        samples=2,
        held_out=4,
        tokens=4,
        training=options,
        use_cpu=True,
    )


def test_another_model_under_the_same_name_is_another_plan(small_plan, tmp_path):
    model = tmp_path / "model"
    plan = dataclasses.replace(small_plan, model=str(model))
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"one")
    headroom.require_same_plan(plan)
    headroom.require_same_plan(plan)
    (model / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match=r"differs in .*what is in `model`"):
        headroom.require_same_plan(plan)
    (model / "model.safetensors").write_bytes(b"one")
    headroom.require_same_plan(plan)
    model.rename(tmp_path / "gone")  # its report may still be wanted
    headroom.require_same_plan(plan)
    (tmp_path / "gone").rename(model)
    headroom.require_same_plan(plan)
    file = tmp_path / "plan.json"  # of an older otpo
    told = json.loads(file.read_text())
    del told["what is in `model`"]
    file.write_text(json.dumps(told))
    headroom.require_same_plan(plan)
    assert json.loads(file.read_text())["what is in `model`"]


@pytest.mark.lengthy
@pytest.mark.parametrize(("fit", "gpus"), [(2, ["0"] * 4), (1, ["0", "0", "1"]), (0, ["0", "0", "1"])])
def test_a_process_without_memory_gives_its_job_back(fit, gpus, small_plan):
    """Where fewer fit a GPU than were asked for, some end, and all jobs are done. Where none fits, each job fails."""
    plan = dataclasses.replace(small_plan, samples=fit, seeds=(0, 1, 2, 3))
    said: list[str] = []
    failures = run_jobs(plan, jobs_of(plan), gpus, said.append, make_doer=headroom_helpers.crowding)
    returned = [line for line in said if "given back: OutOfMemoryError: CUDA out of memory." in line]
    if fit:
        assert not failures and all(result_path(plan, job).is_file() for job in jobs_of(plan))
        least = [int(line.split("stay on its GPU: ")[1][0]) for line in returned]
        assert least and min(least) >= 1
        held = {json.loads(result_path(plan, job).read_text())["gpu"] for job in jobs_of(plan)[1:]}
        assert held == set(gpus)  # no GPU was left alone
    else:
        # The start is given back while two share a GPU, and fails where a process has one to itself.
        assert len(failures) == len(jobs_of(plan)) and "CUDA out of memory" in failures[0].reason
        assert failures[0].job.kind == "start" and len(returned) <= 1


@pytest.mark.lengthy
def test_processes_end_with_the_command_that_is_killed(small_plan, tmp_path):
    plan = dataclasses.replace(small_plan, seeds=(0, 1))
    code = (
        "import headroom_helpers; from test_headroom_plan import plan; "
        "from benchmarks.headroom.plan import jobs_of; from benchmarks.headroom.processes import run_jobs; "
        "run_jobs(plan, jobs_of(plan), ['', ''], print, make_doer=headroom_helpers.endless)"
    )
    (tmp_path / "test_headroom_plan.py").write_text(f"from benchmarks.headroom.plan import Plan\nplan = {plan!r}\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    results = [result_path(plan, Job("pairs", seed)) for seed in plan.seeds]
    try:
        wait_for(lambda: all(path.is_file() and path.read_text() for path in results))
        processes = {json.loads(path.read_text())["pid"] for path in results}
        assert len(processes) == 2 and all(map(headroom_helpers.is_alive, processes))
    finally:
        command.kill()
        command.wait()
    wait_for(lambda: not any(map(headroom_helpers.is_alive, processes)))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_nothing_begins_after_the_time(small_plan, tmp_path):
    jobs = jobs_of(small_plan)
    failures = run_jobs(small_plan, jobs, [""], lambda line: None, seconds=0)
    assert [failure.job for failure in failures] == jobs
    assert {failure.reason for failure in failures} == {"not reached in time"} and not list(tmp_path.iterdir())


def test_a_failed_start_fails_all(small_plan, tmp_path):
    plan = dataclasses.replace(small_plan, model=str(tmp_path / "none"))
    failures = run_jobs(plan, jobs_of(plan), [""], lambda line: None)
    assert [failure.job.kind for failure in failures] == ["start", "pairs", "cell"]
    assert failures[1].reason == "start failed" and failures[2].reason == "pairs_seed0 failed"
    with pytest.raises(ValueError, match="has no result of the start"):
        read_cells(plan)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_rounds_and_held_out_ones(task, small_plan):
    plan = dataclasses.replace(small_plan, task=task, prompts=30, held_out=20, languages=("en", "id"))
    texts = {
        (seed, number): {str(row.get("prompt") or row["messages"][:1]) for row in training_prompts(plan, seed, number)}
        for seed in (0, 1)
        for number in (1, 2)
    }
    assert all(len(found) > 24 for found in texts.values())
    assert len(texts[0, 1] & texts[0, 2]) < 5 and len(texts[0, 1] & texts[1, 1]) < 5
    held_out = held_out_prompts(plan)
    assert list(held_out) == list(HELD_OUT)
    for rows in held_out.values():
        assert len(rows) == 10
        assert not {str(row["prompt"]) for row in rows} & set().union(*texts.values())
        assert all(row.get("length") != "long" for row in rows)


def test_numbers_by_hand(small_plan, tmp_path):
    plan = dataclasses.replace(
        small_plan, weightings={"dpo": {}, "otpo": {}}, seeds=(0, 1), output=str(tmp_path), held_out=4
    )
    (tmp_path / "cells").mkdir()

    def write(job, *rounds):
        one = [
            {
                "held_out": {
                    split: {"right": right[2 * at : 2 * at + 2], "tokens": [4, 6], "kinds": ["list", "list"]}
                    for at, split in enumerate(HELD_OUT)
                }
            }
            for right in rounds
        ]
        (tmp_path / "cells" / f"{job.name}.json").write_text(json.dumps({"rounds": one, "device": "cpu"}))

    write(Job("start"), [1, 0, 0, 0])
    write(Job("cell", 0, "dpo"), [1, 1, 0, 0])
    write(Job("cell", 1, "dpo"), [1, 0, 0, 0])
    write(Job("cell", 0, "otpo"), [1, 1, 1, 0])
    found = read_cells(plan)
    rows = summary_rows(found)
    by_name = {row["weighting"]: row for row in rows}
    assert by_name["start"]["right"] == 25 and by_name["dpo"]["right"] == 37.5
    assert by_name["dpo"]["right_sd"] == pytest.approx(np.std([50, 25], ddof=1), abs=0.01)
    assert by_name["dpo"]["over_start"] == 12.5 and by_name["dpo"]["over_dpo"] == ""
    # Compared on the seed that both have: 75 against 50.
    assert by_name["otpo"]["over_dpo"] == 25 and by_name["otpo"]["seeds"] == 1
    assert by_name["otpo"]["win_rate_length"] == pytest.approx(62.5, abs=0.1)
    assert by_name["otpo"]["over_dpo_low"] <= 25 <= by_name["otpo"]["over_dpo_high"]
    assert "| `otpo` | 75.0 ± 0.0 |" in markdown(rows, "t")
    assert "25.0% right, outside 40 to 70" in headroom_line(rows)
    assert {row["right"] for row in cell_rows(found) if row["held_out"] == "test_templates"} == {0, 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one of the two"),
        (["--model", "m", "--samples", "1"], "`--samples` must be at least 2, got 1"),
        (["--model", "m", "--set", "lr"], "write NAME=VALUE"),
        (["--model", "m", "--set", "seed=1"], "which the command sets itself"),
        (["--model", "m", "--weightings", "best"], r"Unknown weightings \['best'\]"),
        (["--model", "m", "--weightings", "tdpo2"], "which are no weightings"),
    ],
)
def test_wrong_options(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        headroom.read_arguments(["--task", "constraints", "--output", str(tmp_path), *words])
    with pytest.raises(ValueError, match="is of `--task constraints`"):
        headroom.read_arguments(["--task", "shop", "--model", "m", "--sft_steps", "2", "--output", str(tmp_path)])


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert headroom.main(["--task", "shop", "--model", str(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert "it has no config.json" in capsys.readouterr().out.replace("\n", " ")


def test_processes_of_gpus(small_plan, monkeypatch):
    assert devices_of(small_plan, 3) == [""]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    plan = dataclasses.replace(small_plan, use_cpu=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of(plan, 2) == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    assert devices_of(plan, 1) == ["3", "GPU-7"]


def test_reference_answers_of_the_start_are_right(small_plan):
    plan = dataclasses.replace(small_plan, sft_steps=1)
    rows = worker.sft_rows(plan)
    assert rows.column_names == ["prompt", "completion"] and len(rows) == 16
    assert all(check_constraints(row, row["completion"][0]["content"])["all"] for row in training_prompts(plan, 0, 1))


def test_options_are_numbers_where_they_look_like_numbers(tmp_path):
    """YAML takes `2e-5` for a word."""
    given = ["learning_rate=2e-5", "max_steps=40", "lr_scheduler_type=linear", "beta=.5", "loss_type=[ipo]"]
    words = ["--task", "shop", "--model", "m", "--output", str(tmp_path), "--set", *given]
    training = headroom.read_arguments(words)[1].training
    expected = {"learning_rate": 2e-5, "max_steps": 40, "lr_scheduler_type": "linear", "beta": 0.5}
    assert expected.items() <= training.items() and training["loss_type"] == ["ipo"]
