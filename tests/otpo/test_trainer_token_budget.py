"""Training with micro-batches by a number of tokens: the gradient of one batch, the log, resuming, refusals."""

import json
import re
from typing import Any

import pytest
import torch
from budget_helpers import BUDGET, PAIRS, as_one_batch, assert_same_gradients, rows_by_step, still_trainer
from cli_helpers import arguments, python, refusal, two_processes
from datasets import load_dataset
from helpers import assert_same_parameters, history, make_pairs, options, train_and_evaluate, with_images
from transformers import Trainer
from transformers.utils import logging

from otpo import OTPOTrainer
from otpo.cli.align import main
from otpo.training.token_batches import SHARE
from otpo.trl_seam import collected_metrics

LOGGED = ("loss", "rewards/margins", "rewards/margins_unweighted", "weights/ess", "logps/chosen")


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 100},
        {"gradient_accumulation_steps": 2, "loss_type": ["ipo"], "weighting": "uniform"},
        {"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True, "dataloader_drop_last": True},
        {"gradient_accumulation_steps": 2, "row_layout": "shared_prompt"},
        {"gradient_accumulation_steps": 2, "late": True},
    ],
    ids=["three", "one", "all", "ipo", "precomputed", "shared prompts", "read late"],
)
def test_a_step_is_its_pairs_in_one_batch(settings, model_folder, other_model_folder, tmp_path):
    """Loss, metrics and every gradient, of every step of two epochs."""
    late = settings.get("late", False)
    settings = {name: value for name, value in settings.items() if name != "late"}
    trainer, kept = still_trainer(model_folder, other_model_folder, tmp_path, **settings)
    trainer._reads_late = late  # as on a GPU
    trainer.train()
    steps = rows_by_step(trainer)
    assert len(kept.steps) == len(steps) == trainer.state.global_step
    sizes = {len(pairs) for pairs in rows_by_step_of_one(trainer)}
    assert len(sizes) > 1, "all micro-batches have as many pairs, so their share makes no difference"
    log = history(trainer, *LOGGED)
    for rows, gradients, logged in zip(steps, kept.steps, log, strict=True):
        loss, wanted = as_one_batch(trainer, rows)
        assert_same_gradients(gradients, wanted)
        numbers = collected_metrics(trainer)
        assert logged[0] == pytest.approx(loss, rel=1e-5)
        assert logged[1:] == pytest.approx([numbers[name][-1] for name in LOGGED[1:]], rel=1e-4, abs=1e-5)
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        assert sorted(row for rows in epoch for row in rows) == list(range(PAIRS))
    assert steps[: len(steps) // 2] != steps[len(steps) // 2 :]


def rows_by_step_of_one(trainer: OTPOTrainer) -> list[list[int]]:
    budget = trainer.token_budget()
    assert budget is not None
    plan = budget.epoch(0)
    return [plan.batch(step, 0)[0] for step in range(len(budget))]


def test_batches_stay_within_the_budget_and_workers_read_the_same(model_folder, tmp_path):
    found = []
    for workers in (0, 2):
        args = options(tmp_path, tokens_per_batch=BUDGET, dataloader_num_workers=workers)
        trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(PAIRS))
        batches = list(trainer.get_train_dataloader())
        assert len(batches) == len(trainer.get_train_dataloader())
        assert all(batch["attention_mask"].sum() <= BUDGET for batch in batches)
        assert sum(batch[SHARE].pairs for batch in batches) == PAIRS
        found.append([batch["input_ids"].tolist() for batch in batches])
    assert found[0] == found[1]


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}], ids=["", "precomputed"])
def test_resuming_in_an_epochs_middle_repeats_the_trajectory(settings, model_folder, tmp_path):
    """Bitwise, in the second epoch, which has other batches than the first."""

    def make() -> OTPOTrainer:
        args = options(
            tmp_path,
            **{"tokens_per_batch": BUDGET, "max_steps": -1, "num_train_epochs": 3, "ot_reg": 0.05, **settings},
            **{"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 6},
        )
        return OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(PAIRS))

    straight = train_and_evaluate(make())
    budget = straight.trainer.token_budget()
    assert (len(budget) + 1) // 2 == 4, "the sixth step is no longer in the second epoch's middle"
    resumed = train_and_evaluate(make(), resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_parameters(resumed.after, straight.after)
    keys = ("step", "epoch", "loss", "grad_norm", "rewards/margins")
    assert history(resumed.trainer, *keys) == history(straight.trainer, *keys)
    assert straight.trainer.state.epoch == 3.0


def test_max_steps_end_in_an_epoch(model_folder, tmp_path):
    args = options(tmp_path, tokens_per_batch=BUDGET, max_steps=3)
    run = train_and_evaluate(OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(PAIRS)))
    assert run.trainer.state.global_step == 3
    assert run.trainer.get_total_train_batch_size(args) == round(PAIRS / len(run.trainer.token_budget()))


@pytest.mark.lengthy
def test_two_processes_make_the_steps_of_one(model_folder, other_model_folder, tmp_path):
    """Of 13 pairs, so that one process repeats a pair, which does not count; and resuming there."""
    ended = python(*two_processes("token_budget_worker.py"), model_folder, other_model_folder, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = torch.load(tmp_path / "steps.pt")
    trainer, _ = still_trainer(model_folder, other_model_folder, tmp_path / "alone")
    logs = json.loads((tmp_path / "log.json").read_text())
    epochs = [row for rows in found["rows"] for row in rows]
    assert sorted(epochs) == sorted([*range(PAIRS), *range(PAIRS)])
    for rows, gradients, logged in zip(found["rows"], found["gradients"], zip(*logs, strict=True), strict=True):
        loss, wanted = as_one_batch(trainer, rows)
        assert_same_gradients(gradients, wanted)
        numbers = collected_metrics(trainer)
        for found_loss, *others in logged:
            assert found_loss == pytest.approx(loss, rel=1e-5)
            assert others == pytest.approx([numbers[name][-1] for name in LOGGED[1:]], rel=1e-4, abs=1e-5)
    again = json.loads((tmp_path / "resumed.json").read_text())
    assert again["same"] and again["logs"][0] == again["logs"][1]
    assert len(again["logs"][0]) == 3 * again["steps"]


# What is said, and refused


def test_a_pair_above_the_budget_is_named_once(model_folder, tmp_path, caplog):
    logging.get_logger("transformers").addHandler(caplog.handler)
    try:
        args = options(tmp_path, tokens_per_batch=60)
        trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(PAIRS))
        trainer.get_train_dataloader()
    finally:
        logging.get_logger("transformers").removeHandler(caplog.handler)
    budget = trainer.token_budget()
    said = [record.getMessage() for record in caplog.records if "tokens_per_batch=60" in record.getMessage()]
    assert budget is not None
    longest = int(budget.tokens.argmax())
    assert len(said) == 1
    assert f"row {longest} of the training dataset, has {budget.tokens[longest]}: memory" in said[0]
    assert said[0].startswith(f"{(budget.tokens > 60).sum()} pair(s) have more tokens than")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_batch": 0}, "`tokens_per_batch` must be a whole number of at least 1, got 0"),
        ({"tokens_per_batch": "64"}, "`tokens_per_batch` must be a whole number of at least 1, got '64'"),
        ({"tokens_per_batch": 64.5}, "`tokens_per_batch` must be a whole number of at least 1, got 64.5"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` lowers .* Set it to false"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy=group_by_length` orders the pairs"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches` of `accelerator_config` divides batches"),
        ({"loss_type": ["sigmoid", "aot"]}, "`loss_type=aot` sorts the pairs of a micro-batch"),
    ],
)
def test_options_that_contradict_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **{"tokens_per_batch": 100, **changes})


def test_streams_images_and_samplers_are_refused(model_folder, vision_folder, pairs_file, tmp_path):
    args = options(tmp_path, tokens_per_batch=100)
    stream = load_dataset("json", data_files=pairs_file, split="train", streaming=True)
    with pytest.raises(
        ValueError, match=r"`tokens_per_batch=100` .* is a stream, .* set `per_device_train_batch_size`"
    ):
        OTPOTrainer(model_folder, args=args, train_dataset=stream)
    args = options(tmp_path, tokens_per_batch=100, max_length=None)
    with pytest.raises(ValueError, match=r"`tokens_per_batch=100` counts the tokens .* images"):
        OTPOTrainer(vision_folder, args=args, train_dataset=with_images(make_pairs(4)))

    class Ordered(OTPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return Trainer._get_train_sampler(self, train_dataset)

    with pytest.raises(ValueError, match="Ordered has a sampler of its own, and `tokens_per_batch=100`"):
        Ordered(model_folder, args=args, train_dataset=make_pairs(4))


# The command line


def test_the_command_line_has_the_budget(model_folder, pairs_file, tmp_path, capsys, own_process):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--tokens_per_batch" in capsys.readouterr().out
    told = refusal(main, capsys, arguments(model_folder, pairs_file, tmp_path, tokens_per_batch=0))
    assert "`tokens_per_batch` must be a whole number of at least 1, got 0" in told
    changes = {"tokens_per_batch": BUDGET, "gradient_accumulation_steps": 2}
    assert main(arguments(model_folder, pairs_file, tmp_path, **changes)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    said = re.search(
        r"pairs 12 to train on, 0 to evaluate on, about ([\d.]+) in a step: "
        r"micro-batches of up to 150 tokens, ([\d.]+) pairs on average",
        printed,
    )
    assert said is not None, printed
    assert float(said[1]) == pytest.approx(2 * float(said[2]), abs=0.1)
    assert 1.5 < float(said[2]) < 4
