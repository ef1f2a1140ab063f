"""Token weights in the trackers: they arrive, the training does not notice, and a broken tracker ends nothing."""

import json
import sqlite3
import sys
from contextlib import closing

import pytest
from helpers import Collected, make_pairs, options, parameters
from transformers import Trainer, TrainerCallback

import otpo
from otpo import LogTokenWeightsCallback, OTPOTrainer, callbacks
from otpo.explain import explain_rows

NUMBERS = {"ess", "entropy", "max", "margin", "margin_unweighted", "similarity"}


def make_trainer(model_folder, folder, callback=None, **changes):
    given = [] if callback is None else [callback]
    args = options(folder, ot_reg=0.05, max_steps=4, **changes)
    return OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(8), callbacks=given)


def run_with(trackers, monkeypatch, model_folder, folder, rows=(0, 3), every=3):
    """Trains with stand-ins for the trackers, without transformers' own callbacks for them."""
    callback = LogTokenWeightsCallback(rows=rows, every=every)
    trainer = make_trainer(model_folder, folder, callback)
    trainer.args.report_to = [tracker.__name__ for tracker in trackers]
    for tracker in trackers:
        monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_logged_and_when(monkeypatch, model_folder, tmp_path, name):
    tracker = Collected(name)
    trainer = run_with([tracker], monkeypatch, model_folder, tmp_path)
    assert [entry["train/global_step"] for entry in tracker.entries] == [3, 4]  # every third, and the last
    last = tracker.entries[-1]
    rows = {f"token_weights/row_{row}/{number}" for row in (0, 3) for number in NUMBERS}
    assert set(last) == rows | {"token_weights/page", "token_weights/picture", "train/global_step"}
    assert last["token_weights/picture"][0] == "image" and last["token_weights/page"][0] == "html"
    page = last["token_weights/page"][1]
    assert "<h2>row 3</h2>" in page and "<b>step</b> 4" in page
    # The reward of the trained policy, not of the model that training started from.
    pair = explain_rows(trainer, [3])[0]
    assert last["token_weights/row_3/margin"] == pytest.approx(pair.numbers()["margin"], rel=1e-6)
    assert last["token_weights/row_3/margin"] != tracker.entries[0]["token_weights/row_3/margin"]


def test_training_is_the_same_to_the_last_bit(monkeypatch, model_folder, tmp_path):
    plain = make_trainer(model_folder, tmp_path / "plain")
    plain.train()
    looked_at = run_with([Collected("wandb")], monkeypatch, model_folder, tmp_path / "looked", rows=[1], every=2)
    before, after = parameters(plain.model), parameters(looked_at.model)
    assert all(before[name].equal(after[name]) for name in before)
    logs = [
        [
            {name: value for name, value in entry.items() if not name.endswith(("ms", "runtime", "second"))}
            for entry in log
        ]
        for log in (plain.state.log_history, looked_at.state.log_history)
    ]
    assert logs[0] == logs[1]


def test_a_tracker_without_images_gets_the_numbers(monkeypatch, model_folder, tmp_path, caplog):
    tracker = Collected("trackio", plain=True)
    run_with([tracker], monkeypatch, model_folder, tmp_path, rows=[0], every=1)
    assert len(tracker.entries) == 4
    assert set(tracker.entries[0]) == {f"token_weights/row_0/{name}" for name in NUMBERS} | {"train/global_step"}
    assert sum("trackio did not take all of the token weights" in line for line in caplog.messages) == 1


def test_a_tracker_that_fails_ends_nothing(monkeypatch, model_folder, tmp_path, caplog):
    broken = Collected("wandb")
    broken.log = lambda entries: 1 / 0
    trainer = run_with([broken, good := Collected("trackio")], monkeypatch, model_folder, tmp_path, every=2)
    assert trainer.state.global_step == 4 and len(good.entries) == 2
    assert any("wandb did not take all" in line and "ZeroDivisionError" in line for line in caplog.messages)


def test_without_matplotlib_there_are_pages(monkeypatch, model_folder, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_with([tracker := Collected("wandb")], monkeypatch, model_folder, tmp_path, every=2)
    assert all("token_weights/page" in entry and "token_weights/picture" not in entry for entry in tracker.entries)
    assert sum("pip install 'otpo[plots]'" in line for line in caplog.messages) == 1


def test_nothing_is_computed_for_nobody(monkeypatch, model_folder, tmp_path):
    monkeypatch.setattr("otpo.explain.explain_rows", None)
    trainer = make_trainer(model_folder, tmp_path, LogTokenWeightsCallback(every=1))
    trainer.train()  # report_to none
    assert trainer.state.global_step == 4


def test_adapters(monkeypatch, model_folder, tmp_path):
    from peft import LoraConfig

    callback = LogTokenWeightsCallback(rows=[1], every=4)
    args = options(tmp_path, ot_reg=0.05)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = OTPOTrainer(
        model_folder, args=args, train_dataset=make_pairs(8), peft_config=adapter, callbacks=[callback]
    )
    trainer.args.report_to = ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", tracker := Collected("wandb"))
    trainer.train()
    assert tracker.entries[0]["token_weights/row_1/margin_unweighted"] != 0.0


# What is refused


def test_arguments_and_rows_that_are_not_there(model_folder, tmp_path):
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        LogTokenWeightsCallback(every=0)
    with pytest.raises(ValueError, match="`rows` is empty"):
        LogTokenWeightsCallback(rows=[])
    trainer = make_trainer(model_folder, tmp_path)
    trainer.add_callback(LogTokenWeightsCallback(rows=[8]))
    with pytest.raises(ValueError, match="`rows`: the train dataset has no row 8"):
        trainer.train()
    trainer = make_trainer(model_folder, tmp_path, LogTokenWeightsCallback(split="eval"))
    with pytest.raises(ValueError, match=r"`split='eval'`: the trainer has the dataset\(s\) \['train'\]"):
        trainer.train()


def test_other_trainers_are_refused(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path)
    with pytest.raises(TypeError, match="looks at an `OTPOTrainer`"):
        LogTokenWeightsCallback().on_train_begin(trainer.args, trainer.state, trainer.control)
    assert issubclass(LogTokenWeightsCallback, TrainerCallback) and issubclass(OTPOTrainer, Trainer)
    assert otpo.LogTokenWeightsCallback is callbacks.LogTokenWeightsCallback


# The real trackers, where they are installed


def test_tensorboard(model_folder, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(model_folder, tmp_path, LogTokenWeightsCallback(rows=[2], every=2), report_to=["tensorboard"]).train()
    folder = next(tmp_path.glob("runs/*"))
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert {f"token_weights/row_2/{name}" for name in NUMBERS} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("token_weights/row_2/ess")] == [2, 4]
    images = events.Images("token_weights/picture")
    assert [image.step for image in images] == [2, 4] and images[0].encoded_image_string.startswith(b"\x89PNG")
    assert "train/loss" in events.Tags()["scalars"]


def test_wandb_offline(model_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'otpo[wandb]'")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    make_trainer(model_folder, tmp_path, LogTokenWeightsCallback(rows=[2], every=2), report_to=["wandb"]).train()
    import wandb

    wandb.finish()
    run = next(tmp_path.glob("wandb/offline-run-*"))
    kinds = sorted(path.suffix for path in run.rglob("media/*/token_weights/*"))
    assert kinds == [".html", ".html", ".png", ".png"]
    page = next(run.rglob("media/html/token_weights/*.html")).read_text(encoding="utf-8")
    assert "<h2>row 2</h2>" in page and next(run.glob("*.wandb")).stat().st_size > 0


def test_trackio(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    changes = {"report_to": ["trackio"], "project": "otpo-test", "trackio_static_space_id": False}
    make_trainer(model_folder, tmp_path, LogTokenWeightsCallback(rows=[2], every=2), **changes).train()
    with closing(sqlite3.connect(tmp_path / "trackio/otpo-test.db")) as database:
        logged = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    ours = [entry for entry in logged if "token_weights/row_2/ess" in entry]
    assert [entry["train/global_step"] for entry in ours] == [2, 4]
    assert {f"token_weights/row_2/{name}" for name in NUMBERS} <= set(ours[0])
    kinds = sorted(path.suffix for path in (tmp_path / "trackio/media").rglob("*.*"))
    assert kinds == [".html", ".html", ".png", ".png"]
