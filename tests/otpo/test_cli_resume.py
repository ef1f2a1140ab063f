"""Resuming: a checkpoint is whole and of the same run, and Ctrl-C says how to go on from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import HANG, ROOT, arguments, refusal

from otpo.cli import align, pretrain, sft
from otpo.cli.launching.expert_parallel import check_checkpoint
from otpo.cli.options.run_options import Given
from otpo.cli.running.checkpoints import find_checkpoint
from otpo.cli.running.command import _how_to_resume
from otpo.cli.running.identity import RUN_FILE, require_same_run, run_identity

pytestmark = pytest.mark.usefixtures("own_process")
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def run(model_folder, pairs_file, tmp_path_factory):
    """A run's folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    argv = arguments(model_folder, pairs_file, folder, **SAVING, hub_token="secret")
    assert align.main(argv) == 0
    return folder


def resuming(model, data, folder, **changes):
    return arguments(model, data, folder, **{**SAVING, "max_steps": 2, **changes}, resume_from_checkpoint=True)


def test_the_run_is_written_without_secrets(run, model_folder, pairs_file):
    written = [json.loads((folder / RUN_FILE).read_text())["options"] for folder in (run, run / "checkpoint-1")]
    assert written[0] == written[1]
    assert written[0]["model_name_or_path"] == model_folder and written[0]["weighting"] == "otpo"
    assert {"max_steps", "hub_token", "learning_rate", "report", "save_steps"}.isdisjoint(written[0])
    assert "secret" not in (run / RUN_FILE).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "budget"}, '`weighting` was "otpo" and is "budget"'),
        ({"loss_type": "ipo", "beta": 0.2}, '`beta` was 0.1 and is 0.2; `loss_type` was ["sigmoid"] and is ["ipo"]'),
        ({"dataset_name": "otpo/demo"}, 'and is "otpo/demo"'),
        ({"max_train_pairs": 4, "seed": 1}, "`max_train_rows` was null and is 4; `seed` was 42 and is 1"),
        ({"use_peft": True}, "`use_peft` was false and is true"),
    ],
)
def test_another_run_is_refused(changes, message, capsys, run, model_folder, pairs_file):
    found = refusal(align.main, capsys, resuming(model_folder, pairs_file, run, **changes))
    assert f"{run / 'checkpoint-1'} is of another run: " in found and message in found
    assert f"remove {run / 'checkpoint-1' / RUN_FILE} to resume all the same" in found


def test_options_that_say_nothing_do_not_make_another_run():
    names: dict[str, Any] = {
        "use_peft": False,
        "lora_r": 8,
        "weighting": "otpo",
        "d2po_gamma": 0.9,
        "ot_max_iterations": 5,
    }
    kinds, other = align.make_parser().dataclass_types, {**names, "lora_r": 64, "d2po_gamma": 0.5}
    other["ot_max_iterations"] = 5000  # which a warning of the solver advises to raise
    names |= {"row_layout": "auto", "compile_layers": None, "tokens_per_batch": 100}
    other |= {"row_layout": "padded", "compile_layers": True, "tokens_per_batch": 100}
    assert run_identity(kinds, names) == run_identity(kinds, other)
    for changes in ({"use_peft": True}, {"tokens_per_batch": 200}):  # other batches
        assert run_identity(kinds, names) != run_identity(kinds, {**names, **changes})
    assert run_identity(kinds, {"pad_token": "{end"}) == {"pad_token": "{end"}


def test_two_names_of_one_option_make_one_run(tmp_path):
    kinds = align.make_parser().dataclass_types
    older, newer, neither = (
        run_identity(kinds, {"max_train_rows": None, "max_train_pairs": None, "max_eval_pairs": 3, **names})
        for names in ({"max_train_pairs": 4}, {"max_train_rows": 4}, {})
    )
    assert older == newer == {"max_train_rows": 4} and neither == {"max_train_rows": None}
    (tmp_path / "trainer_state.json").touch()
    for written, known in (({"max_train_pairs": 4}, True), ({"max_train_pairs": None}, False), (newer, True)):
        (tmp_path / RUN_FILE).write_text(json.dumps({"options": written}))
        if known:
            assert require_same_run(older, str(tmp_path))
        else:
            with pytest.raises(ValueError, match="`max_train_rows` was null and is 4"):
                require_same_run(newer, str(tmp_path))


def test_a_checkpoint_without_states_of_the_optimizer_is_refused(capsys, run, model_folder, pairs_file, tmp_path):
    bare = tmp_path / "checkpoint-1"
    shutil.copytree(find_checkpoint(True, str(run)), bare)
    (bare / "scheduler.pt").rename(tmp_path / "scheduler.pt")
    argv = arguments(model_folder, pairs_file, tmp_path / "out", **SAVING, resume_from_checkpoint=str(bare))
    assert "has no scheduler.pt, so the learning rate would begin anew" in refusal(align.main, capsys, argv)
    (tmp_path / "scheduler.pt").rename(bare / "scheduler.pt")
    (bare / "optimizer.pt").unlink()
    assert "has no optimizer's states (`save_only_model`)" in refusal(align.main, capsys, argv)


@pytest.mark.parametrize(
    ("config", "refused"), [({}, True), ({"scheduler": {"type": "WarmupLR"}}, False)], ids=["ours", "DeepSpeed's"]
)
def test_a_schedule_of_deepspeeds_own_has_no_file(tmp_path, config, refused):
    (tmp_path / "latest").write_text("global_step2")
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(is_deepspeed_enabled=True, is_fsdp_enabled=False, accelerator=accelerator)
    with pytest.raises(ValueError, match=r"has no scheduler\.pt") if refused else nullcontext():
        check_checkpoint(str(tmp_path), trainer)


def test_another_model_is_refused(capsys, run, other_model_folder, pairs_file):
    found = refusal(align.main, capsys, resuming(other_model_folder, pairs_file, run))
    assert "`model_name_or_path` was" in found and found.count(" was ") == 1


def test_what_may_change_and_checkpoints_of_before(capsys, run, model_folder, pairs_file, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run").rglob(RUN_FILE):
        file.unlink()
    changes = {"logging_steps": 2, "report": tmp_path / "report.json", "learning_rate": 0.02, "save_steps": 5}
    for folder, word in ((run, ""), (tmp_path / "run", ", which does not tell the run that it is of")):
        capsys.readouterr()
        assert align.main(resuming(os.path.relpath(model_folder), pairs_file, folder, **changes)) == 0
        assert f"resuming   from {folder / 'checkpoint-1'}{word}\n" in capsys.readouterr().out


def test_instructions_too(capsys, compass_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "the red", "completion": "box"}\n' * 4)
    assert sft.main(arguments(compass_folder, str(file), tmp_path / "out", **SAVING)) == 0
    found = refusal(sft.main, capsys, resuming(compass_folder, str(file), tmp_path / "out", packing=True))
    assert "`packing` was false and is true" in found


def test_pretraining_too(capsys, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "documents.jsonl").write_text('{"text": "the red shirt ships today from Jakarta to Manila"}\n' * 40)
    made = {"preset": "compass-tiny", "tokenizer_name_or_path": tmp_path / "tokenizer", "sequence_length": 32}
    argv = arguments(None, str(tmp_path / "documents.jsonl"), tmp_path / "out", **made, **SAVING, bf16=None)
    assert pretrain.main(argv) == 0
    again = [*argv, "--resume_from_checkpoint", "true", "--sequence_length", "16", "--max_steps", "2"]
    assert "`sequence_length` was 32 and is 16" in refusal(pretrain.main, capsys, again)

    def fail(*_args, **_kwargs):
        raise ValueError("in a step")

    monkeypatch.setattr("moe_backbone.pretraining.trainer.PretrainingTrainer.training_step", fail)
    with pytest.raises(ValueError, match="in a step"):
        pretrain.main(argv)


def test_folders_that_are_no_checkpoint(run, tmp_path):
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no trainer_state.json. Name a folder that the"):
        find_checkpoint(str(tmp_path), None)
    with pytest.raises(ValueError, match=r"Name the last one in it, .*checkpoint-[12]"):
        find_checkpoint(str(run), None)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    with pytest.raises(ValueError, match="it has no weights"):
        find_checkpoint(str(tmp_path), None)
    for text in ("{", "{}", "[1]"):
        (tmp_path / "trainer_state.json").write_text(text)
        with pytest.raises(ValueError, match=r"its trainer_state.json can't be read"):
            find_checkpoint(str(tmp_path), None)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kept", [0, 300])
def test_a_checkpoint_whose_file_is_cut_off_is_passed_over(run, tmp_path, name, kept):
    for step in (1, 2):
        shutil.copytree(run / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:kept])
    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=f"is no checkpoint: its {name} is no whole file"):
        find_checkpoint(str(file.parent), None)


def test_ctrl_c_names_the_checkpoint_where_an_earlier_run_went_further(run, tmp_path):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-9")
    os.utime(tmp_path / "checkpoint-9" / "trainer_state.json", (0, 0))
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    given = Given({"output_dir": str(tmp_path), "resume_from_checkpoint": None}, {}, [], [], [])
    advice = _how_to_resume([given], since=1)
    assert advice == f"resume with the same command and `--resume_from_checkpoint {tmp_path / 'checkpoint-1'}`"
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert "`--resume_from_checkpoint true`, which goes on from" in _how_to_resume([given], since=1)


@pytest.mark.lengthy
@pytest.mark.parametrize("processes", [None, 1, 2], ids=lambda count: f"{count}")
def test_ctrl_c(processes, model_folder, pairs_file, tmp_path):
    argv = arguments(model_folder, pairs_file, tmp_path / "out", **{**SAVING, "max_steps": 100_000})
    words = [sys.executable, "-m", "otpo", "align", *argv, "--save_total_limit", "2"]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    variables = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w+") as log:
        # A shell starts background jobs with Ctrl-C ignored, which processes inherit: these tests may run in one.
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + HANG
        while not list((tmp_path / "out").glob("checkpoint-[3-9]")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(HANG) == 130
        log.seek(0)
        text = log.read()
    assert "Traceback" not in text and text.count("stopped by you") == 1
    advice = "resume with the same command and `--resume_from_checkpoint true`, which goes on from"
    assert f"otpo align: stopped by you; {advice} {tmp_path / 'out/checkpoint-'}" in text
