"""TDPO2 and TIS-DPO against their formulas, written out from all logits."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from helpers import assert_same_parameters, collate, hashed_weights, make_pairs, options, parameters
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.ablation.rivals import tdpo
from benchmarks.ablation.rivals.contrastive import ContrastiveWeighting
from benchmarks.ablation.rivals.tdpo import TDPOTrainer
from otpo import OTPOTrainer, PairBatch
from otpo.explain import explain_rows


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


def written(policy, reference, batch, alpha, beta=0.1, weights: Any = 1.0):
    """TDPO2's loss in float64; each token's log-ratio and divergence times its weight."""
    mask = batch["completion_mask"][:, 1:].double() * weights
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


def test_weights_multiply_the_divergence_too_in_chunks_of_any_size(
    model_folder, other_model_folder, tmp_path, batch, monkeypatch
):
    mask = batch["completion_mask"][:, 1:].bool()
    weights = hashed_weights(PairBatch(mask, batch["input_ids"][:, 1:], mask, mask))
    want = written(load(model_folder), load(other_model_folder), batch, 0.5, weights=weights)
    monkeypatch.setattr(tdpo, "_TOKENS", 3)
    changes = {"ref_model": load(other_model_folder), "weighting_callable": hashed_weights}
    trainer = trainer_of(model_folder, tmp_path, **changes)
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_it_trains_and_evaluates(model_folder, tmp_path, settings):
    trainer = trainer_of(model_folder, tmp_path, max_steps=3, **settings)
    trainer.train()
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_rewards/margins"] != pytest.approx(found["eval_rewards/margins_unweighted"], rel=1e-3)


def test_explaining_needs_the_reference(model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path)
    assert explain_rows(trainer, [0])[0].has_reference
    with pytest.raises(ValueError, match=r"needs the reference's distributions.*`reference=True`"):
        explain_rows(trainer, [0], reference=False)


def test_without_alpha_and_at_the_start_it_is_dpo(model_folder, tmp_path):
    losses, after = {}, {}
    for name, kind, extra in (
        ("dpo", OTPOTrainer, {}),
        ("none", TDPOTrainer, {"alpha": 0.0}),
        ("half", TDPOTrainer, {"alpha": 0.5}),
    ):
        trainer = trainer_of(model_folder, tmp_path / name, kind, max_steps=3, **extra)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        after[name] = parameters(trainer.model)
    assert losses["none"] == losses["dpo"]
    assert_same_parameters(after["none"], after["dpo"])
    assert losses["half"][0] == pytest.approx(losses["dpo"][0], rel=1e-6)
    assert losses["half"][2] != pytest.approx(losses["dpo"][2], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}, "an adapter"),
        ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs`"),
        ({"loss_type": ["ipo"]}, "another loss"),
        ({"f_divergence_type": "js_divergence"}, "another divergence"),
        ({"use_weighting": True}, "`use_weighting`"),
        ({"alpha": -1.0}, "`alpha` must be at least 0, got -1.0"),
    ],
)
def test_what_tdpo_cannot_do_is_refused(model_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(model_folder, tmp_path, **changes)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "lm_head_multiplier"])
def test_logits_that_are_not_the_heads_are_refused(model_folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Qwen3Config, name, 2.0, raising=False)
    with pytest.raises(ValueError, match=rf"can't be trained with (capped|scaled) logits \(`{name}`\)\."):
        trainer_of(model_folder, tmp_path)


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


@torch.no_grad()
def test_contrastive_weights_know_no_padding_side(model_folder, other_model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path, OTPOTrainer)
    right = collate(trainer, [0, 1, 2])
    shifts = right["attention_mask"].eq(0).sum(1).tolist()
    assert max(shifts) > 0
    left = {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in right.items()
    }
    weighting = ContrastiveWeighting(load(model_folder), load(other_model_folder))
    of_right, of_left = (weighting(pairs)[pairs.mask] for pairs in map(pair_batch, (right, left)))
    torch.testing.assert_close(of_right, of_left, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_contrastive_weights_stay_in_their_bounds(model_folder, other_model_folder, batch):
    pairs = pair_batch(batch)
    weights = ContrastiveWeighting(load(model_folder), load(other_model_folder))(pairs)
    for side, mask, low, high in zip(weights.chunk(2), pairs.mask.chunk(2), (-0.5, -1.5), (1.5, 0.5), strict=True):
        log_weights = side[mask].log()
        assert (low - 1e-6 <= log_weights.min()) and (log_weights.max() <= high + 1e-6)
        torch.testing.assert_close(log_weights.aminmax(), (torch.tensor(low), torch.tensor(high)))  # both are met


def test_contrastive_weights_of_images_are_refused(model_folder, other_model_folder, batch):
    pairs = pair_batch(batch)
    seen = {**pairs.inputs, "pixel_values": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"reads text alone, and the batch has \['pixel_values'\] too"):
        ContrastiveWeighting(load(model_folder), load(other_model_folder))(dataclasses.replace(pairs, inputs=seen))


def test_contrastive_weights_train(model_folder, other_model_folder, tmp_path):
    models = [load(model_folder), load(other_model_folder)]
    before = copy.deepcopy(models[1].state_dict())
    weighting = ContrastiveWeighting(*models)
    trainer = trainer_of(model_folder, tmp_path, OTPOTrainer, weighting_callable=weighting, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(value.equal(before[name]) for name, value in models[1].state_dict().items())
