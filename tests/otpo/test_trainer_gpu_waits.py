"""On a CUDA device a training step waits for nothing outside of logging. Run with `-m gpu`.

`torch.cuda.set_sync_debug_mode("error")` raises where torch itself would wait for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import ODD, At, folder_bytes, make_pairs, option_dict, pairs_with_one_odd, poison
from transformers import AutoModelForCausalLM, TrainerCallback

from otpo import OTPOConfig, OTPOTrainer
from otpo.training.timing import DeviceTimer

pytestmark = pytest.mark.gpu

STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "otpo": {},
    "float32": {"bf16": False},  # padded: flash attention takes half precision alone
    "packed": {"row_layout": "packed"},
    "padded": {"row_layout": "padded"},
    "uniform": {"weighting": "uniform"},
    "checkpointing": {"gradient_checkpointing": True},
    "exo_pair": {"weighting": "uniform", "loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "three_losses": {"weighting": "sampo", "loss_type": ["sigmoid", "ipo", "sft"]},
    "wpo": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def gpu_options(folder: Any, **changes: Any) -> OTPOConfig:
    settings = {"bf16": True, "ot_reg": 0.1, **changes}
    return OTPOConfig(**{**option_dict(folder, **settings), "use_cpu": False, "learning_rate": 1e-3})


@contextmanager
def waits_allowed() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def allowed(function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with waits_allowed():
            return function(*args, **kwargs)

    return call


def leave_out_padded_models(trainer: OTPOTrainer) -> None:
    """In padded rows TRL's fused head asks which positions are scored, and transformers whether a mask is all ones."""
    if trainer.layout.name == "padded":
        for model in {trainer.model, trainer.ref_model} - {None}:
            model.forward = allowed(model.forward)
        trainer.accelerator.backward = allowed(trainer.accelerator.backward)


class ErrorsFromTheSecondStep(TrainerCallback):
    """From the start of the second step, loading of the batches of all later ones included, to the end of the last.

    The first one compares the reference with the policy and TRL's loss with a known one, once, and waits for that.
    """

    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name, model_folder, tmp_path):
    args = gpu_options(tmp_path, logging_steps=STEPS, max_steps=STEPS, **CASES[name])
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(64))
    leave_out_padded_models(trainer)
    watch = ErrorsFromTheSecondStep()
    trainer.add_callback(watch)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.steps == STEPS - 1
    logged = trainer.state.log_history[0]
    assert logged["num_tokens"] > 0 and {"rewards/margins", "logits/chosen", "weights/ess", "entropy"} <= logged.keys()


def test_errors_are_raised_where_something_waits(model_folder, tmp_path):
    class Asking(OTPOTrainer):
        def token_weights(self, batch):
            return batch.mask.float() if batch.mask.any() else batch.logps

    args = gpu_options(tmp_path, logging_steps=STEPS, max_steps=STEPS)
    trainer = Asking(model_folder, args=args, train_dataset=make_pairs(64))
    leave_out_padded_models(trainer)
    trainer.add_callback(ErrorsFromTheSecondStep())
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_times_that_nobody_takes_keep_no_events():
    timer, device = DeviceTimer(), torch.device("cuda")
    for _ in range(50):
        with timer.region(device):
            torch.ones(8, device=device).sum()
        torch.cuda.synchronize()
    assert len(timer._running) == 1
    assert len(timer.take()) == 50 and not timer.take()


@pytest.mark.parametrize("saves", [True, False], ids=["save", "nobody"])
def test_a_bad_step_is_found_one_step_late_and_not_saved(saves, model_folder, tmp_path, tokenizer):
    """All six pairs that can be trained on in each step; the third is bad."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1} if saves else {}
    steps = {"per_device_train_batch_size": 6, "logging_steps": 100, "max_steps": 9}
    args = gpu_options(tmp_path / "out", max_length=40, **steps, **saving)
    trainer = OTPOTrainer(model, args=args, train_dataset=pairs_with_one_odd("chosen"))
    trainer.add_callback(At("on_step_begin", 2, lambda: poison(model, tokenizer.convert_tokens_to_ids(ODD))))
    with pytest.raises(FloatingPointError, match=r"row\(s\) 5 of the training.* after 2 optimizer step.*Nothing was"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert any("checkpoint-2/" in name for name in folder_bytes(tmp_path)) == saves
    assert not (tmp_path / "out" / "checkpoint-3").exists()
