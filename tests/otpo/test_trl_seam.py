"""What TRL's loss is handed is read; a release that reads something else is refused before it trains."""

import inspect
import textwrap

import pytest
import torch
from helpers import make_pairs, options
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from otpo import OTPOTrainer

RENAMED = {
    "self.precompute_ref_logps": "self.precompute_reference",
    'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]': 'inputs["chosen_logps"], inputs["rejected_logps"]',
    "self.beta": "self.args.beta",
    "self.loss_types": "self.args.loss_type",
}


def with_other_names(method, old: str, new: str):
    """TRL's own method, reading another name."""
    source = textwrap.dedent(inspect.getsource(method))
    assert old in source, f"TRL no longer reads {old}"
    scope: dict = {}
    exec(source.replace(old, new), vars(dpo_trainer), scope)
    return scope[method.__name__]


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_attribute_is_not_a_wrong_loss(old, model_folder, other_model_folder, tmp_path, monkeypatch):
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    args = options(tmp_path, max_steps=1, beta=0.1, ot_reg=0.05, loss_type=["sigmoid", "sft"])
    trainer = OTPOTrainer(model_folder, reference, args, train_dataset=make_pairs())
    monkeypatch.setattr(DPOTrainer, "precompute_reference", False, raising=False)
    monkeypatch.setattr(DPOTrainer, "_compute_loss", with_other_names(DPOTrainer._compute_loss, old, RENAMED[old]))
    with pytest.raises(RuntimeError, match=r"`DPOTrainer._compute_loss` .* trl 1\..*install 'trl>=1.16,<1.17'"):
        trainer.train()


def test_every_step_asks_whether_its_inputs_are_read(model_folder, other_model_folder, tmp_path, monkeypatch):
    """After the first loss, which is checked by its value."""
    reference = AutoModelForCausalLM.from_pretrained(other_model_folder)
    trainer = OTPOTrainer(model_folder, reference, options(tmp_path, max_steps=1), train_dataset=make_pairs())
    trainer.train()
    monkeypatch.setattr(DPOTrainer, "precompute_reference", False, raising=False)
    changed = with_other_names(DPOTrainer._compute_loss, "self.precompute_ref_logps", "self.precompute_reference")
    monkeypatch.setattr(DPOTrainer, "_compute_loss", changed)
    with pytest.raises(RuntimeError, match="has not used the reference's ref_chosen_logps and ref_rejected_logps"):
        trainer.train()


def test_the_check_leaves_no_trace(model_folder, tmp_path):
    """Neither in the metrics nor in the options nor in the random generators."""
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, max_steps=1), train_dataset=make_pairs())
    state, before = torch.get_rng_state(), {name: vars(trainer)[name] for name in ("beta", "loss_types", "ld_alpha")}
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.compute_loss(trainer.model, batch)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: vars(trainer)[name] for name in before} == before
    found = trainer._metrics["train" if trainer.model.training else "eval"]
    assert len(found["rewards/margins"]) == 1
