"""Schedules of the learning rate: those that transformers can make, and those that it would stop at in training."""

import pytest
from transformers import SchedulerType

from moe_backbone.pretraining.schedule import check_schedule

NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 100},
}


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_can_be_made(kind):
    check_schedule(kind, NEEDED.get(kind), 1e-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "learning_rate", "message"),
    [
        ("cosine", {"least": 1}, 1e-3, "unexpected keyword argument 'least'"),
        ("cosine_with_min_lr", None, 1e-3, "One of min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": "low"}, 1e-3, "unsupported operand"),
        ("cosine_with_min_lr", {"min_lr": float("nan")}, 1e-3, "min_lr must be a finite number, got nan"),
        ("polynomial", {"lr_end": -0.1}, 1e-3, "the learning rate would be -0.0"),
        ("warmup_stable_decay", {}, 1e-3, "num_decay_steps"),
        ("polynomial", {"lr_end": 0.1}, 1e-3, "must be smaller than initial lr"),
        ("constant_with_warmup", {"min_lr": 0.1}, 1e-3, "takes no arguments, got {'min_lr': 0.1}"),
    ],
)
def test_schedules_that_can_not_be_made(kind, arguments, learning_rate, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(kind, arguments, learning_rate)
