"""Pretraining on a CUDA device: no step waits for it, and the fast ways give the plain ones' numbers. `-m gpu`."""

from typing import Any

import pytest
import torch
from pretraining_helpers import chain_documents, logged, pretrainer, tiny_compass
from transformers import TrainerCallback

from moe_backbone.packed_attention import NAME
from moe_backbone.pretraining.packing import pack_documents

pytestmark = pytest.mark.gpu
STEPS = 6


class ErrorsFromTheThirdStep(TrainerCallback):
    """torch raises where it would wait for the device, from the third step to the end of the one before the last."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 2 <= state.global_step < STEPS - 1:
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")
        else:
            torch.cuda.set_sync_debug_mode("default")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def train(
    folder: Any,
    *,
    attention: str,
    experts: str,
    compiled: bool,
    watched: bool = True,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    torch._dynamo.reset()
    model = tiny_compass(num_mtp_layers=1, router_bias_update_speed=0.01, head_dim=16).to(dtype)
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    rows = pack_documents(chain_documents(400), 32)
    options = {"use_cpu": False, "bf16": True, "max_steps": STEPS, "logging_steps": STEPS, **changes}
    trainer = pretrainer(folder, model=model, rows=rows, **options)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    watch = ErrorsFromTheThirdStep()
    if watched:
        trainer.add_callback(watch)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.steps == (STEPS - 3 if watched else 0)
    return {name: logged(trainer, name)[-1] for name in ("loss", "lm_loss", "mtp_loss", "router/load_entropy")}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_no_step_waits_for_the_device(tmp_path, compiled, changes):
    changes["per_device_train_batch_size"] = 4
    fast = train(tmp_path / "fast", attention=NAME, experts="memcpy", compiled=compiled, **changes)
    plain = {"attention": "sdpa", "experts": "grouped_mm", "compiled": False, "watched": False, "token_loss": "logits"}
    slow = train(tmp_path / "plain", **plain, **changes)
    assert fast == pytest.approx(slow, rel=5e-3)


def test_no_step_of_bfloat16_weights_waits_for_the_device(tmp_path):
    of = {"attention": NAME, "experts": "memcpy", "compiled": False, "optim": "adamw_torch_fused"}
    halves = train(tmp_path / "halves", **of, dtype=torch.bfloat16)
    assert halves == pytest.approx(train(tmp_path / "whole", **of), rel=2e-2)


def test_a_gradient_that_is_not_finite_stops_the_training(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    model.lm_head.weight[5, 0] = torch.inf

    model = tiny_compass()
    trainer = pretrainer(tmp_path, model=model, use_cpu=False, save_strategy="steps", save_steps=1)
    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"after 3 step\(s\)"):
        trainer.train()
    assert sorted(each.name for each in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
