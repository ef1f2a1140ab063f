"""Clipping within the optimizer's kernel is clipping before it, and a step of no finite norm changes nothing."""

import copy

import pytest
import torch
from accelerate import DistributedType
from pretraining_helpers import logged, pretrainer
from torch import nn

from moe_backbone.pretraining import trainer as pretraining
from moe_backbone.pretraining.fused_clipping import clip_in_optimizer, takes_scales
from moe_backbone.pretraining.master_adamw import MasterAdamW


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e3])
def test_steps_are_those_of_clipping_before(max_norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    models = [model, copy.deepcopy(model)]
    optimizers = [fused(each) for each in models]
    for _ in range(6):
        rows = torch.randn(4, 5)
        norms = []
        for each, optimizer, within in zip(models, optimizers, (True, False), strict=True):
            optimizer.zero_grad()
            (3 * each(rows).square().sum()).backward()
            clip = (
                clip_in_optimizer
                if within
                else lambda of, norm, each=each: nn.utils.clip_grad_norm_(each.parameters(), norm)
            )
            norms.append(clip(optimizer, max_norm))
            optimizer.step()
        torch.testing.assert_close(*norms)
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_step_without_a_finite_norm_changes_nothing(value):
    model = nn.Linear(3, 2)
    optimizer = fused(model)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight.grad[1, 1] = value
    assert not clip_in_optimizer(optimizer, 1.0).isfinite()
    optimizer.step()
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    model.weight.grad.fill_(1.0)
    clip_in_optimizer(optimizer, 1.0)
    optimizer.step()
    assert not torch.equal(before["weight"], model.weight)


def test_which_optimizers_take_scales():
    model = nn.Linear(3, 2)
    assert takes_scales(fused(model), DistributedType.NO) and takes_scales(fused(model), DistributedType.MULTI_GPU)
    assert not takes_scales(fused(model), DistributedType.DEEPSPEED)
    assert not takes_scales(torch.optim.AdamW(model.parameters()), DistributedType.NO)

    class Other(torch.optim.AdamW):
        """May have a step of its own."""

    assert not takes_scales(Other(model.parameters(), fused=True), DistributedType.NO)
    loaded = fused(model)
    loaded.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())  # whose groups are not fused
    assert not takes_scales(loaded, DistributedType.NO)
    assert not takes_scales(torch.optim.SGD(model.parameters(), fused=True), DistributedType.NO)


def test_scales_end_with_their_step():
    model = nn.Linear(3, 2)
    optimizer = fused(model)
    for value in (1e3, torch.inf):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        clip_in_optimizer(optimizer, 1.0)
        optimizer.step()
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    assert len(optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("of", [fused, lambda model: MasterAdamW(model.parameters(), lr=0.05, weight_decay=0.1)])
def test_a_second_clipping_replaces_the_first_beside_other_hooks(of):
    models = [nn.Linear(3, 2)]
    models.append(copy.deepcopy(models[0]))
    one, other = (of(model) for model in models)
    for _ in range(2):
        for model in models:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 3.0)
        stepped = []
        clip_in_optimizer(one, 1.0)
        handle = one.register_step_post_hook(lambda *_, stepped=stepped: stepped.append(1))
        clip_in_optimizer(one, 0.1)
        one.step()
        handle.remove()
        clip_in_optimizer(other, 0.1)
        other.step()
        assert stepped == [1]
    assert getattr(one, "grad_scale", None) is None and getattr(one, "found_inf", None) is None
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)


def test_scales_of_others_stay():
    model = nn.Linear(3, 2)
    optimizer = fused(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip_in_optimizer(optimizer, 1.0)
    optimizer.step()
    optimizer.grad_scale = optimizer.found_inf = torch.zeros(())  # fp16's scaler deletes them itself
    optimizer.grad_scale = torch.ones(())
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_above_zero(max_norm):
    with pytest.raises(ValueError, match=rf"`max_norm={max_norm}` must be above 0"):
        clip_in_optimizer(fused(nn.Linear(3, 2)), max_norm)


def test_a_run_goes_on_from_an_optimizer_that_is_not_fused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    pretrainer(tmp_path, optim="adamw_torch", **options).train()
    trainer = pretrainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.05}, {"max_grad_norm": 0.0}], ids=str)
def test_a_training_is_the_same(tmp_path, monkeypatch, changes):
    found = []
    for within in (True, False):
        if not within:
            monkeypatch.setattr(pretraining, "takes_scales", lambda *_: False)
        trainer = pretrainer(tmp_path / str(within), max_steps=4, **changes)
        trainer.train()
        found.append(logged(trainer, "loss") + logged(trainer, "grad_norm"))
        assert trainer._left_out == (within and changes.get("max_grad_norm") != 0.0)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
