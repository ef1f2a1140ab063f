"""One of two processes under ZeRO-3 on the CPU: TRL's trainer and ours on the same pairs, then what they found.

torchrun --nproc_per_node 2 zero3_worker.py MODEL FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from helpers import lora, make_pairs, option_dict
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer

from otpo import OTPOConfig, OTPOTrainer

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "adapter": {"lora": True},
    "frozen": {"frozen": "model.embed_tokens.weight"},
}
"""Options of runs, and what is done to their models."""
STEPS = 4


def leaves(model: Any) -> int:
    """How many modules ZeRO-3 gathers whole."""
    from deepspeed.utils import z3_leaf_module

    return sum(z3_leaf_module(module) for module in model.modules())


def losses(name: str, model: str, folder: Path, trainer_class: Any, *, late_freeze: bool = False) -> dict[str, Any]:
    """Each step's loss, and how many layers are whole, of policy and reference."""
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    changes = dict(CASES[name])
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapter = {"peft_config": lora(init_lora_weights=False)} if changes.pop("lora", False) else {}
    frozen = changes.pop("frozen", None)

    def freeze() -> None:
        if frozen is not None:
            policy.get_parameter(frozen).requires_grad_(False)

    if not late_freeze:
        freeze()
    steps = changes.get("gradient_accumulation_steps", 1)
    # Gradients are reduced in the midst of a backward pass, as in large models.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000}
    deepspeed = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": steps, "zero_optimization": zero}
    own = {"row_layout": "packed", "weighting": "uniform"} if trainer_class is OTPOTrainer else {}
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": STEPS, "use_cpu": False}
    options |= {"logging_steps": 1, "max_grad_norm": 1e9, "accelerator_config": {"use_configured_state": True}}
    options |= {"deepspeed": deepspeed | {"zero_allow_untested_optimizer": True}, **changes, **own}
    if trainer_class is DPOTrainer:
        names = DPOConfig.__dataclass_fields__
        args = DPOConfig(**{key: each for key, each in option_dict(folder, **options).items() if key in names})
    else:
        args = OTPOConfig(**option_dict(folder, **options))
    trainer = trainer_class(policy, args=args, train_dataset=make_pairs(32), **adapter)
    if late_freeze:
        freeze()
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reference = trainer.ref_model
    whole = leaves(trainer.model), 0 if reference is None else leaves(reference)
    for engine in (trainer.deepspeed, reference):
        if hasattr(engine, "destroy"):
            engine.destroy()
    trainer.accelerator.free_memory()
    return {"losses": found, "leaves": whole}


def compare(name: str, model: str, folder: Path) -> dict[str, Any]:
    """A case by both trainers. TRL's own can't precompute data in memory, each process of which has another file."""
    theirs = "plain" if name == "precomputed" else name
    found: dict[str, Any] = {"trl": losses(theirs, model, folder / "trl", DPOTrainer)}
    found["otpo"] = losses(name, model, folder / "otpo", OTPOTrainer)
    if name == "frozen":
        try:
            losses(name, model, folder / "late", OTPOTrainer, late_freeze=True)
        except ValueError as error:
            found["late"] = str(error)
    return found


def main(model: str, folder: Path) -> None:
    state = PartialState(backend="gloo")
    found = {name: compare(name, model, folder / name) for name in CASES}
    if state.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    main(sys.argv[1], Path(sys.argv[2]))
