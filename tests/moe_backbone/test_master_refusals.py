"""What AdamW on float32 masters refuses: other states, other types, numbers out of range."""

import pytest
import torch
from torch import nn

from moe_backbone.pretraining.master_adamw import MasterAdamW


def test_states_of_another_optimizer_are_refused():
    weight = nn.Parameter(torch.ones(3).bfloat16())
    plain = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3).bfloat16()
    plain.step()
    with pytest.raises(ValueError, match=r"exp_avg \(bfloat16 \[3\]\).*`dtype` and `optim`.*`model_name_or_path`"):
        MasterAdamW([weight]).load_state_dict(plain.state_dict())

    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    for other, why in (
        (torch.optim.AdamW(weights, maximize=True), "maximize=True"),
        (torch.optim.Adam(weights), "decoupled_weight_decay=False"),
        (MasterAdamW(weights[:1]), r"\[1\] weights, and this run's \[2\]"),
        (MasterAdamW(weights[::-1]), r"of a weight \(float32 \[2\]\).*exp_avg \(float32 \[3\]\)"),
    ):
        other.step()
        optimizer = MasterAdamW(weights)
        with pytest.raises(ValueError, match=why):
            optimizer.load_state_dict(other.state_dict())
        assert not optimizer.state and optimizer.param_groups[0]["params"] == weights


def test_a_step_that_is_refused_changes_nothing():
    weights = [nn.Parameter(torch.ones(4, 3).bfloat16()) for _ in range(2)]
    optimizer = MasterAdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[1].grad = weights[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state and torch.equal(weights[0], torch.ones_like(weights[0]))


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_weight_that_is_cast_after_a_step_is_refused(kinds):
    weight = nn.Parameter(torch.ones(3, dtype=kinds[0]))
    optimizer = MasterAdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None
    weight.data = weight.data.to(kinds[1])
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=rf"cast to {kinds[1]}.*new optimizer"):
        optimizer.step()


@pytest.mark.parametrize(
    "changes", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"eps": -1.0}, {"weight_decay": -1.0}], ids=str
)
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        MasterAdamW([nn.Parameter(torch.ones(1))], **changes)
    with pytest.raises(ValueError, match=r"in torch\.float16"):
        MasterAdamW([nn.Parameter(torch.ones(1).half())])
    optimizer = MasterAdamW([nn.Parameter(torch.ones(1))])
    for group in (
        {"params": [nn.Parameter(torch.ones(1))], **changes},
        {"params": [nn.Parameter(torch.ones(1).half())]},
    ):
        with pytest.raises(ValueError, match=r"Set it to|float16"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
