"""TDPO2 and TIS-DPO against their formulas, written out from all logits."""

import copy
from typing import Any

import pytest
import torch
from helpers import make_pairs, options
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ablation.rivals.contrastive import ContrastiveWeighting
from benchmarks.ablation.rivals.tdpo import TDPOTrainer
from otpo import OTPOTrainer, PairBatch


def load(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer_of(
    folder, tmp_path, kind: type[OTPOTrainer] = TDPOTrainer, ref_model=None, peft_config=None, **changes: Any
) -> Any:
    extra = {name: changes.pop(name) for name in ("alpha", "weighting_callable") if name in changes}
    if "weighting_callable" in extra:
        extra["weighting"] = extra.pop("weighting_callable")
    return kind(
        load(folder),
        ref_model,
        args=options(tmp_path, **{"weighting": "uniform", **changes}),
        train_dataset=make_pairs(6),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
        **extra,
    )


@pytest.fixture
def batch(model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path / "batch", OTPOTrainer)
    return next(iter(trainer.get_train_dataloader()))


def written(policy, reference, batch, alpha, beta=0.1):
    mask = batch["completion_mask"][:, 1:].double()
    seen = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logps, wanted = (model(**seen).logits[:, :-1].double().log_softmax(2) for model in (policy, reference))
    wanted = wanted.detach()
    ids = batch["input_ids"][:, 1:, None]
    ratios = ((logps.gather(2, ids) - wanted.gather(2, ids)).squeeze(2) * mask).sum(1)
    divergence = ((wanted.exp() * (wanted - logps)).sum(2) * mask).sum(1)
    chosen, rejected = ratios.chunk(2)
    held, free = divergence.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected - alpha * (free - held.detach()))).mean()


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_loss_and_gradients_are_the_papers(model_folder, other_model_folder, tmp_path, batch, alpha):
    trainer = trainer_of(model_folder, tmp_path, ref_model=load(other_model_folder), alpha=alpha)
    trainer.state.global_step = 1  # the reference is no copy
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    policy, reference = load(model_folder), load(other_model_folder)
    want = written(policy, reference, batch, alpha)
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    grads = dict(policy.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: n + m)


def test_without_alpha_and_at_the_start_it_is_dpo(model_folder, tmp_path):
    losses = {}
    for name, kind, extra in (
        ("dpo", OTPOTrainer, {}),
        ("none", TDPOTrainer, {"alpha": 0.0}),
        ("half", TDPOTrainer, {"alpha": 0.5}),
    ):
        trainer = trainer_of(model_folder, tmp_path / name, kind, max_steps=3, **extra)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["none"] == pytest.approx(losses["dpo"], rel=1e-6)
    assert losses["half"][0] == pytest.approx(losses["dpo"][0], rel=1e-6)
    assert losses["half"][2] != pytest.approx(losses["dpo"][2], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}, "an adapter"),
        ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs`"),
        ({"loss_type": ["ipo"]}, "another loss"),
        ({"use_weighting": True}, "`use_weighting`"),
        ({"alpha": -1.0}, "`alpha` must be at least 0, got -1.0"),
    ],
)
def test_what_tdpo_cannot_do_is_refused(model_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(model_folder, tmp_path, **changes)


def pair_batch(batch):
    mask = batch["completion_mask"][:, 1:].bool()
    seen = {name: batch[name] for name in ("input_ids", "attention_mask")}
    nothing = torch.zeros(mask.shape)
    return PairBatch(mask, batch["input_ids"][:, 1:], nothing, nothing[..., None], 0, seen)


@torch.no_grad()
def test_contrastive_weights(model_folder, other_model_folder, batch):
    pairs, models = pair_batch(batch), [load(model_folder).eval(), load(other_model_folder).eval()]
    got = ContrastiveWeighting(*models)(pairs)
    logps = [
        model(**pairs.inputs).logits[:, :-1].log_softmax(2).gather(2, pairs.token_ids[..., None]).squeeze(2)
        for model in models
    ]
    rewards = (logps[0] - logps[1]).clamp(-0.5, 1.5)
    want = torch.cat([rewards.chunk(2)[0].exp(), (-rewards.chunk(2)[1]).exp()])
    torch.testing.assert_close(got[pairs.mask], want[pairs.mask], rtol=1e-4, atol=1e-5)
    swapped = ContrastiveWeighting(*models[::-1], lower=-9, upper=9)(pairs)
    straight = ContrastiveWeighting(*models, lower=-9, upper=9)(pairs)
    torch.testing.assert_close((swapped * straight)[pairs.mask], torch.ones(int(pairs.mask.sum())))
    assert ContrastiveWeighting(*models, mu=0.0)(pairs)[pairs.mask].eq(1).all()
    with pytest.raises(ValueError, match=r"`lower` at most `upper`, got 1\.0, 2, 1"):
        ContrastiveWeighting(*models, lower=2, upper=1)


def test_contrastive_weights_train(model_folder, other_model_folder, tmp_path):
    models = [load(model_folder), load(other_model_folder)]
    before = copy.deepcopy(models[1].state_dict())
    weighting = ContrastiveWeighting(*models)
    trainer = trainer_of(model_folder, tmp_path, OTPOTrainer, weighting_callable=weighting, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(value.equal(before[name]) for name, value in models[1].state_dict().items())
