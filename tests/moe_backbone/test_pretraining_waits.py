"""A step of pretraining reads nothing off the device: what would wait for a GPU raises, on the CPU."""

from typing import Any

import pytest
import torch
from no_waits import NoWaits, Waited
from pretraining_helpers import chain_documents, pretrainer, tiny_compass
from transformers import TrainerCallback

from moe_backbone.pretraining.master_adamw import MasterAdamW
from moe_backbone.pretraining.norm_check import NormCheck
from moe_backbone.pretraining.packing import pack_documents

STEPS = 5


class WatchedSteps(TrainerCallback):
    """Watches from the second step to the end of the one before the last, which is logged."""

    def __init__(self, watch: NoWaits) -> None:
        self._watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.on = 0 < state.global_step < STEPS - 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.on = False


def train(folder: Any, watch: NoWaits, dtype: torch.dtype, **changes: Any) -> Any:
    """A trainer that has trained under the watch, but for its batches and what runs otherwise on a GPU.

    These are the model's forward passes, and the look at a norm, which a GPU is asked for steps later.
    """
    model = tiny_compass(num_mtp_layers=1, router_bias_update_speed=0.01).to(dtype)
    rows = pack_documents(chain_documents(400), 32)
    options = {"max_steps": STEPS, "logging_steps": STEPS, "optim": "adamw_torch_fused", **changes}
    trainer = pretrainer(folder, model=model, rows=rows, **options)
    trainer.add_callback(WatchedSteps(watch))

    def paused(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with watch.pause():
                return function(*args, **kwargs)

        return call

    model.forward = paused(model.forward)
    with watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormCheck, "add", paused(NormCheck.add))
        trainer.train()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}], ids=str)
def test_no_step_waits(tmp_path, dtype, changes):
    watch = NoWaits()
    trainer = train(tmp_path, watch, dtype, bf16=dtype == torch.bfloat16, **changes)
    assert trainer.state.global_step == STEPS and watch.looked_at
    optimizer = trainer.optimizer.optimizer
    assert (type(optimizer) is MasterAdamW) == (dtype == torch.bfloat16)
    assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}


def test_the_watch_sees_a_wait_of_the_optimizer(tmp_path, monkeypatch):
    step = MasterAdamW.step

    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch._foreach_add_([torch.zeros(())], torch.ones(()))  # read as a number
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MasterAdamW, "step", asking)
    with pytest.raises(Waited, match="local_scalar_dense"):
        train(tmp_path, NoWaits(), torch.bfloat16, bf16=True)
