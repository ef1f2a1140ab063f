"""The reference: precomputed or not it is the same, and it is the policy's copy unless the user gives another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    bits,
    hashed_weights,
    make_pairs,
    make_trainer,
    moved,
    options,
    parameters,
    train_and_evaluate,
)
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from written_loss import LORA, SGD, load, uneven_pairs

from otpo import OTPOTrainer, trl_seam


@pytest.mark.parametrize(
    ("settings", "weighting", "adapter"),
    [
        ({"ot_reg": 0.05}, None, False),
        ({}, hashed_weights, False),
        ({"weighting": "sampo"}, None, False),
        ({"weighting": "ld", "ld_alpha": 0.3}, None, False),
        ({"loss_type": ["ipo", "sigmoid", "sft"]}, hashed_weights, False),
        ({"max_length": 24}, hashed_weights, False),
        ({"precompute_ref_batch_size": 3}, hashed_weights, False),
        ({"ot_reg": 0.05}, None, True),
    ],
    ids=["otpo", "hashed", "sampo", "ld", "three_losses", "truncated", "other_batch_size", "lora"],
)
def test_precomputed_is_online(settings, weighting, adapter, model_folder, tmp_path):
    """To float32 rounding alone: the reference's batches are padded otherwise."""
    runs = []
    for precompute in (False, True):
        extra = {"peft_config": LoraConfig(**LORA, init_lora_weights=False)} if adapter else {}
        trainer = OTPOTrainer(
            model_folder,
            args=options(tmp_path, **SGD, **{**settings, "precompute_ref_log_probs": precompute}),
            train_dataset=make_pairs(),
            eval_dataset=make_pairs(6, seed=3),
            weighting=weighting,
            **extra,
        )
        runs.append(train_and_evaluate(trainer))
    online, precomputed = runs
    assert moved(online)
    for name, value in online.after.items():
        torch.testing.assert_close(precomputed.after[name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(precomputed.losses, online.losses, rtol=1e-5, atol=1e-6)
    for key, value in online.evaluation.items():
        if key != "eval_rewards/accuracies":
            assert precomputed.evaluation[key] == pytest.approx(value, rel=1e-4, abs=2e-5), key


def test_evaluating_another_dataset_with_a_precomputed_reference(model_folder, other_model_folder, tmp_path):
    """Its completions may be longer than the training dataset's: the width of the stored rows follows."""
    results = []
    for precompute in (False, True):
        trainer = OTPOTrainer(
            model_folder,
            load(other_model_folder),
            options(tmp_path, ot_reg=0.05, precompute_ref_log_probs=precompute),
            train_dataset=uneven_pairs(),
        )
        results.append(trainer.evaluate(make_pairs(5, seed=8)))
        trainer.train()
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-5)


def test_precomputed_rows_of_data_in_memory_lie_where_every_process_looks(model_folder, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs = make_pairs()
    assert not pairs.cache_files
    for _ in range(2):
        trainer = make_trainer(model_folder, tmp_path / "out", pairs, precompute_ref_log_probs=True)
        assert "ref_chosen_logps" in trainer.train_dataset.column_names
        assert len(list((tmp_path / "cache/otpo").glob("cache-*.arrow"))) == 1


@pytest.mark.parametrize("split", ["train", "eval"])
def test_precomputing_for_a_stream(split, model_folder, tmp_path):
    data = {"train_dataset": make_pairs(), "eval_dataset": make_pairs()}
    data[f"{split}_dataset"] = data[f"{split}_dataset"].to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`precompute_ref_log_probs=True`.*(?s:.)*`precompute_ref_log_probs=False`"):
        OTPOTrainer(model_folder, args=options(tmp_path, precompute_ref_log_probs=True), **data)


def test_a_stream_that_is_precomputed_is_refused_in_trls_words(model_folder, tmp_path):
    with pytest.raises(ValueError, match="is not supported with IterableDataset"):
        make_trainer(model_folder, tmp_path, make_pairs().to_iterable_dataset(), precompute_ref_log_probs=True)


def test_a_reference_that_is_not_the_policys_copy_stops_before_the_first_step(model_folder, tmp_path):
    """A model changed in memory: its copy is loaded from the folder, without the change."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    before = parameters(model)
    trainer = make_trainer(model, tmp_path, make_pairs())
    with pytest.raises(RuntimeError, match=r"differ from the policy's by .* nats a token.* pass `ref_model`"):
        trainer.train()
    assert bits(parameters(trainer.model)) == bits(before)


def test_a_reference_of_ones_own_may_be_another_model(model_folder, other_model_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(other_model_folder)
    trainer = OTPOTrainer(model_folder, other, options(tmp_path, max_steps=1), train_dataset=make_pairs())
    trainer.train()
    assert trainer.state.global_step == 1


# Differences that are no faults


def with_dropout(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.5)
    assert model.config.attention_dropout == 0.5
    return model


@pytest.mark.parametrize(
    "noise", [{"disable_dropout": False}, {"neftune_noise_alpha": 50.0}], ids=lambda n: next(iter(n))
)
def test_noise_of_training_is_no_other_reference(noise, model_folder, tmp_path):
    trainer = make_trainer(with_dropout(model_folder), tmp_path, make_pairs(), max_steps=1, **noise)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_changed_model_is_found_behind_noise(model_folder, tmp_path):
    model = with_dropout(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    with pytest.raises(RuntimeError, match="differ from the policy's"):
        make_trainer(model, tmp_path, make_pairs(), disable_dropout=False).train()


ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(**LORA, init_lora_weights=False),
    "dora": lambda: LoraConfig(**LORA, init_lora_weights=False, use_dora=True),
    "head": lambda: LoraConfig(**LORA, init_lora_weights=False, modules_to_save=["lm_head"]),
    "tokens": lambda: LoraConfig(**LORA, init_lora_weights=False, trainable_token_indices=[3, 4]),
    "bias": lambda: LoraConfig(**LORA, init_lora_weights=False, bias="all"),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
def test_the_policy_without_its_adapter_is_peft_s_and_comes_back(name, model_folder, tmp_path):
    """One walk that sets flags has the result of PEFT's own switch, and leaves nothing behind."""
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), ADAPTERS[name]())
    with torch.no_grad():
        for parameter in model.parameters():  # those that start as ones and zeros too
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.gradient_checkpointing_enable()
    trainer: Any = SimpleNamespace(model=model, args=SimpleNamespace(gradient_checkpointing_kwargs=None))

    def state() -> Any:
        flags = [(sorted(vars(module)), vars(module).get("_disable_adapters")) for module in model.modules()]
        checkpointing = [vars(module).get("gradient_checkpointing") for module in model.modules()]
        return flags, checkpointing, [parameter.requires_grad for parameter in model.parameters()]

    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits[:, -10:]
        with model.disable_adapter():
            expected = model(input_ids=ids).logits
        before = state()
        with pytest.raises(KeyError), trl_seam.policy_as_reference(trainer, model):
            assert not any(vars(module).get("gradient_checkpointing") for module in model.modules())
            found = model(input_ids=ids).logits
            raise KeyError
        assert state() == before
        assert torch.equal(found, expected)
        assert torch.equal(model(input_ids=ids).logits[:, -10:], adapted)
    assert not torch.equal(found, adapted)
