"""An evaluation's numbers are means over its pairs, whatever the batches and the processes."""

import json
from functools import partial

import pytest
from cli_helpers import python, two_processes
from helpers import hashed_weights, make_pairs, option_dict
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from otpo import OTPOConfig, OTPOTrainer
from otpo.transport.options import TransportOptions
from otpo.weighting import contrast


def evaluate(model_folder, other_model_folder, folder, pairs, size, trainer=OTPOTrainer, **changes):
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    config = DPOConfig if trainer is DPOTrainer else OTPOConfig
    args = config(**option_dict(folder, per_device_eval_batch_size=size))
    made = trainer(
        model_folder, reference, args, train_dataset=make_pairs(), eval_dataset=make_pairs(pairs, seed=8), **changes
    )
    return {name: value for name, value in made.evaluate().items() if not name.endswith(("runtime", "second"))}


@pytest.mark.parametrize("pairs", [5, 6, 7])
def test_batches_do_not_matter(pairs, model_folder, other_model_folder, tmp_path):
    """TRL's own numbers of batches of one pair are means over pairs."""
    places = (model_folder, other_model_folder, tmp_path, pairs)
    want = evaluate(*places, 1, weighting=hashed_weights)
    got = evaluate(*places, 4, weighting=hashed_weights)
    # TRL's means over the tokens of a batch; and what counts batches.
    one_by_one = {f"eval_{name}" for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")}
    one_by_one |= {"eval_transport/ms", "eval_num_tokens"}
    for name in want.keys() - one_by_one:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name
    # Of DPO's: what both have, with weights of one.
    want = evaluate(*places, 1, DPOTrainer)
    got = evaluate(*places, 4, weighting=lambda batch: batch.mask.float())
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_loss"} <= want.keys()
    for name in want.keys() - one_by_one:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


def test_what_contrast_logs_is_of_pairs_too(model_folder, other_model_folder, tmp_path):
    weighting = partial(contrast, options=TransportOptions(cost="cosine", reg=0.1))
    one, four = (
        evaluate(model_folder, other_model_folder, tmp_path, 7, size, weighting=weighting)["eval_contrast/destroyed"]
        for size in (1, 4)
    )
    assert four == pytest.approx(one, rel=1e-4) and one > 0.01


def predicted(trainer, data):
    return {name.removeprefix("test_"): value for name, value in trainer.predict(data).metrics.items()}


def test_predictions_take_what_evaluations_take(model_folder, other_model_folder, tmp_path):
    """Rows of text, which transformers' `predict` alone would find no column of its own in."""
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    args = OTPOConfig(**option_dict(tmp_path, weighting="otpo*diff"))
    trainer = OTPOTrainer(model_folder, reference, args, train_dataset=make_pairs(), eval_dataset=make_pairs(5))
    want = trainer.evaluate()["eval_loss"]
    assert predicted(trainer, make_pairs(5))["loss"] == pytest.approx(want, rel=1e-6)
    assert predicted(trainer, trainer.eval_dataset)["loss"] == pytest.approx(want, rel=1e-6)


@pytest.mark.lengthy
def test_two_processes_count_no_pair_twice(model_folder, other_model_folder, tmp_path):
    """Of five pairs in batches of four, two processes see three pairs twice; and the first process saves alone."""
    want = evaluate(model_folder, other_model_folder, tmp_path, 5, 1, weighting=hashed_weights)
    ended = python(*two_processes("ddp_worker.py"), model_folder, other_model_folder, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-2000:]
    got = json.loads((tmp_path / "metrics.json").read_text())
    for name in want:
        if name.startswith(("eval_rewards/", "eval_weights/", "eval_logps/")):
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "explained.json").read_text()) == ["row 2"]
