"""With weights of one, `OTPOTrainer` is `trl.DPOTrainer`: bit for bit in parameters and in every logged number."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import (
    LOSS_TYPES,
    assert_same_parameters,
    lora,
    make_pairs,
    moved,
    option_dict,
    train_and_evaluate,
    with_images,
)
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from otpo import OTPOConfig, OTPOTrainer


@dataclass
class Case:
    """One way to train.

    Attributes:
        options: Options on top of `helpers.option_dict`.
        arguments: Makes further arguments of the trainer; called anew for each of the two trainers.
        model: Makes the model from `arguments`' folders; the plain Qwen3's folder by default.
        data: Makes the training dataset.
    """

    options: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[dict[str, str]], dict[str, Any]] = lambda folders: {}
    model: Callable[[dict[str, str]], Any] = lambda folders: folders["qwen3"]
    data: Callable[[], Any] = make_pairs


def pretrained_adapter(folders: dict[str, str]) -> Any:
    """A PEFT model whose adapter is not zero, so that its reference is the adapter's copy, not the base model."""
    torch.manual_seed(3)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folders["qwen3"]), lora(init_lora_weights=False))


def plain_text_pairs() -> Dataset:
    return make_pairs().map(
        lambda row: {
            "prompt": row["prompt"][0]["content"] + " ",
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
    )


CASES: dict[str, Case] = {
    **{f"loss-{name}": Case({"loss_type": [name], **extra}) for name, extra in LOSS_TYPES.items()},
    "loss-mpo": Case({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "divergence-forward_kl": Case({"f_divergence_type": "forward_kl"}),
    "divergence-js": Case({"f_divergence_type": "js_divergence"}),
    "divergence-alpha": Case({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "wpo": Case({"use_weighting": True}),
    "ld_alpha": Case({"ld_alpha": 0.5}),
    "sync_ref_model": Case({"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}),
    "checkpointing-non_reentrant": Case(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ),
    "checkpointing-reentrant": Case(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    "bf16": Case({"bf16": True}),
    "fp16": Case({"fp16": True}),
    "lora": Case(arguments=lambda folders: {"peft_config": lora()}),
    "lora-bf16-checkpointing": Case(
        {"bf16": True, "gradient_checkpointing": True}, arguments=lambda folders: {"peft_config": lora()}
    ),
    "pretrained_adapter": Case(model=pretrained_adapter),
    "prompt_tuning": Case(
        arguments=lambda folders: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    ),
    "vision": Case(
        {"max_length": None},
        arguments=lambda folders: {"eval_dataset": with_images(make_pairs(8, seed=3))},
        model=lambda folders: folders["vision"],
        data=lambda: with_images(make_pairs()),
    ),
    "moe": Case(model=lambda folders: folders["moe"]),
    "moe-mpo": Case({"loss_type": ["sigmoid", "sft"]}, model=lambda folders: folders["moe"]),
    "accumulation": Case({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "max_length-keep_start": Case({"max_length": 24}),
    "max_length-keep_end": Case({"max_length": 24, "truncation_mode": "keep_end"}),
    "no_max_length": Case({"max_length": None}),
    "explicit_reference": Case(
        arguments=lambda folders: {"ref_model": AutoModelForCausalLM.from_pretrained(folders["other"])}
    ),
    "streaming": Case(data=lambda: make_pairs().to_iterable_dataset()),
    "plain_text": Case(data=plain_text_pairs),
    "implicit_prompt": Case(
        data=lambda: make_pairs().map(
            lambda row: {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}, remove_columns="prompt"
        )
    ),
    "one_pair_batches": Case({"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}),
    "compute_metrics": Case(
        arguments=lambda folders: {"compute_metrics": lambda seen: {"largest": float(seen.predictions.max())}}
    ),
    "several_eval_datasets": Case(
        arguments=lambda folders: {"eval_dataset": {"a": make_pairs(3, seed=4), "b": make_pairs(8, seed=5)}}
    ),
    "custom_collator": Case(
        arguments=lambda folders: {"data_collator": DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=64)}
    ),
    "extra_columns": Case(
        {"remove_unused_columns": False},
        data=lambda: make_pairs().add_column("source", ["web"] * 16).add_column("score", list(range(16))),
    ),
    "accumulation-partial_step": Case(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_steps": 4},
        data=lambda: make_pairs(13),
    ),
    "ragged_last_batch": Case({"per_device_train_batch_size": 3, "max_steps": 6}),
}


@pytest.fixture(scope="module")
def folders(model_folder, other_model_folder, moe_folder, vision_folder) -> dict[str, str]:
    return {"qwen3": model_folder, "other": other_model_folder, "moe": moe_folder, "vision": vision_folder}


def train(trainer_class: type, config_class: type, case: Case, folders: dict[str, str], tmp_path: Path, **extra: Any):
    trainer = trainer_class(
        case.model(folders),
        args=config_class(**option_dict(tmp_path, **case.options, **extra)),
        train_dataset=case.data(),
        **{"eval_dataset": make_pairs(8, seed=3), **case.arguments(folders)},
    )
    return train_and_evaluate(trainer)


# TRL averages an evaluation over batches, ours is over pairs: they are the same where batches are full.
@pytest.mark.parametrize("name", CASES)
def test_uniform_weights_are_dpo_bitwise(name, folders, tmp_path):
    case = CASES[name]
    want = train(DPOTrainer, DPOConfig, case, folders, tmp_path)
    got = train(OTPOTrainer, OTPOConfig, case, folders, tmp_path, weighting="uniform")

    assert moved(want), "the case must train something"
    assert len(want.losses) == case.options.get("max_steps", 4)
    assert_same_parameters(got.after, want.after)
    assert len(got.log) == len(want.log)
    for ours, theirs in zip([*got.log, got.evaluation], [*want.log, want.evaluation], strict=True):
        assert {key: ours.get(key) for key in theirs} == theirs


@pytest.mark.parametrize("ld_alpha", [None, 0.5], ids=["sum", "ld_alpha"])
def test_precomputed_reference_is_dpo(ld_alpha, folders, tmp_path):
    """Not bitwise: DPO stores sums over batches in dataset order, padded otherwise than the training batches, and
    float32 rows of another width reduce in another order. Plain SGD, since Adam's first steps divide 1e-7 by
    itself.
    """
    case = Case({"precompute_ref_log_probs": True, "optim": "sgd", "learning_rate": 0.05, "ld_alpha": ld_alpha})
    want = train(DPOTrainer, DPOConfig, case, folders, tmp_path)
    got = train(OTPOTrainer, OTPOConfig, case, folders, tmp_path, weighting="uniform")
    assert moved(want)
    for name, value in want.after.items():
        torch.testing.assert_close(got.after[name], value, rtol=0, atol=1e-6, msg=name)
    # Sums of some twenty log-probabilities near -5: a float32 ulp of 100 is 8e-6.
    for key, value in want.evaluation.items():
        assert got.evaluation[key] == pytest.approx(value, rel=1e-5, abs=1e-4), key
    torch.testing.assert_close(got.losses, want.losses, rtol=0, atol=1e-5)


def test_ld_weights_are_ld_alpha(folders, tmp_path):
    """Not bitwise: DPO adds `shared + ld_alpha * tail`, two sums, where the weights make one sum of products."""
    case = Case({"optim": "sgd", "learning_rate": 0.05, "ld_alpha": 0.5})
    want = train(DPOTrainer, DPOConfig, case, folders, tmp_path)
    got = train(OTPOTrainer, OTPOConfig, case, folders, tmp_path, weighting="ld")
    plain = train(DPOTrainer, DPOConfig, Case({**case.options, "ld_alpha": None}), folders, tmp_path)
    for name, value in want.after.items():
        torch.testing.assert_close(got.after[name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(got.losses, want.losses, rtol=0, atol=1e-5)
    assert abs(plain.losses[-1] - want.losses[-1]) > 1e-3, "ld_alpha must matter here"
