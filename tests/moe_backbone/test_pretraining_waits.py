"""A step of pretraining reads nothing off the device: what would wait for a GPU raises, on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_in_float64 import backward, forward
from no_waits import NoWaits, Waited
from pretraining_helpers import chain_documents, pretrainer, tiny_compass
from transformers import TrainerCallback

from moe_backbone.packed_attention import NAME
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


def train(folder: Any, watch: NoWaits, dtype: torch.dtype, of_model: Any = None, **changes: Any) -> Any:
    """A trainer that has trained under the watch, but for its batches and what runs otherwise on a GPU.

    That is the look at a norm, which a GPU is asked for steps later. Attention by lengths runs by stand-ins of its
    kernels, experts by the references of ours.
    """
    sizes = {"num_mtp_layers": 2, "router_bias_update_speed": 0.01, "router_z_loss_coef": 1e-3, **(of_model or {})}
    model: Any = tiny_compass(**sizes).to(dtype)  # pyright: ignore[reportArgumentType]
    model.set_attn_implementation(NAME)
    model.set_experts_implementation("memcpy")
    rows: Any = pack_documents(chain_documents(400), 32)
    options = {"max_steps": STEPS, "logging_steps": STEPS, "optim": "adamw_torch_fused", **changes}
    trainer = pretrainer(folder, model=model, rows=rows, eval_rows=rows.select(range(8)), **options)
    trainer.add_callback(WatchedSteps(watch))

    def paused(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with watch.pause():
                return function(*args, **kwargs)

        return call

    kernels = SimpleNamespace(_flash_attention_forward=paused(forward), _flash_attention_backward=paused(backward))
    with watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr("otpo_kernels.flash._aten", kernels)
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setattr(NormCheck, "add", paused(NormCheck.add))
        trainer.train()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
        {"max_grad_norm": 0.0, "of_model": {"num_mtp_layers": 0, "router_bias_update_speed": 0.0}},
        {"gradient_checkpointing": True, "of_model": {"mtp_detach_trunk": True, "mtp_detach_head": True}},
        {"token_loss": "chunked", "of_model": {"num_shared_experts": 1}},
        {"token_loss": "kernel"},
    ],
    ids=str,
)
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


def test_the_watch_sees_what_kernels_for_a_gpu_ask():
    numbers, mask = torch.arange(3), torch.tensor([True, False, True])
    one: Any = torch.ones((), dtype=torch.long)
    asking = (
        lambda: numbers.masked_fill(mask, one),
        lambda: numbers.index_fill(0, numbers, one),
        lambda: numbers.repeat_interleave(numbers),
        lambda: numbers.bincount(),
        lambda: numbers.unique_consecutive(),
        lambda: numbers[mask],
        lambda: torch.nn.functional.one_hot(numbers),
        lambda: torch.arange(one),
        lambda: numbers.cpu(),
        lambda: numbers.tolist(),
    )
    with NoWaits() as watch:
        watch.on = True
        for ask in asking:
            with pytest.raises(Waited):
                ask()
        numbers.repeat_interleave(numbers, output_size=3)
        numbers.masked_fill(mask, 1)


@pytest.mark.parametrize("wait", [False, True])
def test_a_resumed_epoch_copies_as_any_other(wait, tmp_path):
    """accelerate makes its loader anew, and would wait for each of its batches."""
    rows = pack_documents(chain_documents(400), 32)
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    found: list[bool] = []

    class Loaders(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loader: Any = trainer.accelerator.gradient_state.active_dataloader
            found.append(loader._non_blocking)

    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = pretrainer(tmp_path, rows=rows, accelerator_config={"non_blocking": not wait}, **saving)
        trainer.add_callback(Loaders())
        trainer.train(resume_from_checkpoint=checkpoint)
    assert found == [not wait] * 6
