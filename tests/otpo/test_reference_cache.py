"""Precomputed reference log-probabilities: whose they are, when they are used, and how much room they take."""

from pathlib import Path

import pytest
import torch
from cli_helpers import python
from datasets import Dataset, load_from_disk
from helpers import (
    history,
    make_pairs,
    make_plain_pairs,
    option_dict,
    options,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from otpo import OTPOConfig, OTPOTrainer
from otpo.training.reference_cache import KEY_COLUMN, REFERENCE_COLUMNS, describe_model


@pytest.fixture
def stored_pairs(tmp_path):
    """A dataset in a folder of its own, so that no other test's cache files lie beside it."""
    make_pairs(seed=5).save_to_disk(str(tmp_path / "pairs"))
    return lambda: load_from_disk(str(tmp_path / "pairs"))


@pytest.fixture
def reference_passes(monkeypatch):
    """Counts the batches that TRL's reference pass is run on."""
    calls: list[int] = []
    original = DPOTrainer.compute_ref_log_probs

    def counted(self, model, inputs):
        calls.append(len(inputs["input_ids"]))
        return original(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)
    return calls


def first_loss(trainer: OTPOTrainer) -> float:
    trainer.train()
    return history(trainer, "loss")[0][0]


def adapter(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


PRECOMPUTE = {"precompute_ref_log_probs": True, "max_length": 30}


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ({}, True),
        ({"beta": 0.01}, True),
        ({"learning_rate": 1e-4}, True),
        ({"ot_reg": 0.02}, True),
        ({"weighting": "budget"}, True),
        ({"loss_type": ["ipo"]}, True),
        ({"ld_alpha": 0.5}, True),
        ({"seed": 99}, True),
        ({"per_device_train_batch_size": 2}, True),
        ({"max_length": 20}, False),
        ({"max_length": None}, False),
        ({"truncation_mode": "keep_end"}, False),
        ({"bf16": True}, False),
    ],
    ids=lambda value: ",".join(map(str, value.items())) or "nothing" if isinstance(value, dict) else None,
)
def test_cache_of_the_reference(change, reused, model_folder, tmp_path, stored_pairs, reference_passes):
    OTPOTrainer(model_folder, args=options(tmp_path, **PRECOMPUTE), train_dataset=stored_pairs())
    assert len(reference_passes) == 4
    reference_passes.clear()
    trainer = OTPOTrainer(
        model_folder, args=options(tmp_path, **{**PRECOMPUTE, **change}), train_dataset=stored_pairs()
    )
    assert (len(reference_passes) == 0) == reused
    trainer.train()  # and what was read can be trained with


@pytest.mark.parametrize("what", ["weights", "tokens"])
def test_cache_follows_the_model_and_the_data(
    what, model_folder, other_model_folder, tmp_path, stored_pairs, reference_passes
):
    OTPOTrainer(model_folder, args=options(tmp_path, **PRECOMPUTE), train_dataset=stored_pairs())
    reference_passes.clear()
    folder = other_model_folder if what == "weights" else model_folder
    data = stored_pairs() if what == "weights" else stored_pairs().select([*range(15), 0])
    OTPOTrainer(folder, args=options(tmp_path, **PRECOMPUTE), train_dataset=data)
    assert len(reference_passes) == 4


@pytest.mark.parametrize("first", ["dpo", "otpo"])
def test_cache_is_not_shared_with_dpo(first, model_folder, tmp_path, stored_pairs, reference_passes):
    kinds = {"dpo": (DPOTrainer, DPOConfig), "otpo": (OTPOTrainer, OTPOConfig)}
    stored = {}
    for name in (first, "otpo" if first == "dpo" else "dpo"):
        trainer_class, config_class = kinds[name]
        reference_passes.clear()
        trainer = trainer_class(
            model_folder,
            args=config_class(**option_dict(tmp_path, **PRECOMPUTE)),
            train_dataset=stored_pairs(),
        )
        assert len(reference_passes) == 4, f"{name} read the other's cache"
        stored[name] = trainer.train_dataset["ref_chosen_logps"][:]
    sums = torch.tensor([sum(row) for row in stored["otpo"]])
    torch.testing.assert_close(sums, torch.tensor(stored["dpo"]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("loading", "lora", "again"),
    [
        ({}, {}, False),
        ({"rms_norm_eps": 1.0}, {}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, {}, True),
        ({"attn_implementation": "eager"}, {}, True),
        ({"dtype": "bfloat16"}, {}, True),
        ({}, {"lora_alpha": 99}, True),
    ],
    ids=["nothing", "rms_norm_eps", "rope", "attention", "dtype", "adapter"],
)
def test_another_model_is_asked_again(loading, lora, again, model_folder, tmp_path, stored_pairs, reference_passes):
    """The first loss of a reference that is the policy is log 2, whatever was stored before."""
    OTPOTrainer(
        model_folder,
        args=options(tmp_path, precompute_ref_log_probs=True),
        train_dataset=stored_pairs(),
        peft_config=adapter(),
    )
    reference_passes.clear()
    args = options(tmp_path, precompute_ref_log_probs=True, model_init_kwargs=loading, max_steps=1)
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=stored_pairs(), peft_config=adapter(**lora))
    assert (len(reference_passes) > 0) == again
    assert first_loss(trainer) == pytest.approx(0.6931, abs=2e-3)


def test_what_a_model_computes_with(model_folder):
    """The folder that a model came from is no part of it, its parameters' dtype and its adapters are."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    before = describe_model(model)
    model.config._name_or_path = "elsewhere"
    assert describe_model(model) == before
    model.model.norm.variance_epsilon = 1.0  # set by hand, so that the configuration does not say it
    assert describe_model(model) != before


def test_rows_that_are_not_asked_for_are_not_used(model_folder, other_model_folder, tmp_path):
    """Rows of another model, brought along by the data, with precomputation off."""
    other = AutoModelForCausalLM.from_pretrained(other_model_folder)
    args = options(tmp_path, precompute_ref_log_probs=True, max_steps=1)
    rows = OTPOTrainer(model_folder, other, args, train_dataset=make_pairs()).train_dataset
    tokens = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for columns in ([*tokens, *REFERENCE_COLUMNS, KEY_COLUMN], [*tokens, *REFERENCE_COLUMNS]):
        trainer = OTPOTrainer(
            model_folder, args=options(tmp_path, max_steps=1), train_dataset=rows.select_columns(columns)
        )
        assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)
    stream = rows.select_columns([*tokens, *REFERENCE_COLUMNS, KEY_COLUMN]).to_iterable_dataset()
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, max_steps=1), train_dataset=stream)
    assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)


def test_rows_carry_their_key(model_folder, other_model_folder, tmp_path, reference_passes):
    """Rows that were stored with the data are used by the model that made them, and refused for another."""
    args = options(tmp_path, precompute_ref_log_probs=True, max_steps=1)
    made = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs()).train_dataset
    made.save_to_disk(str(tmp_path / "stored"))
    rows = load_from_disk(str(tmp_path / "stored"))
    tokens = rows.remove_columns(["prompt", "chosen", "rejected"])
    reference_passes.clear()
    for data in (rows, tokens):
        trainer = OTPOTrainer(model_folder, args=args, train_dataset=data)
        assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)
    with pytest.raises(ValueError, match=r"\['ref_chosen_logps', .*precomputed by another model, other rows or"):
        OTPOTrainer(other_model_folder, args=args, train_dataset=rows)
    with pytest.raises(ValueError, match=r"precomputed by another program. Remove them with `dataset.remove_columns"):
        OTPOTrainer(model_folder, args=args, train_dataset=tokens.remove_columns([KEY_COLUMN]))


def test_one_long_completion_does_not_widen_all_rows(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    count, long = 300, 400
    rows = [(f"cotton {i} ", " yes", " no") for i in range(count)]
    rows[7] = ("cotton ", " red" * long, " no")
    args = options(
        tmp_path, precompute_ref_log_probs=True, max_length=None, max_steps=1, per_device_train_batch_size=50
    )
    trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_plain_pairs(rows))
    lengths = [len(row) for row in trainer.train_dataset["ref_chosen_logps"]]
    assert lengths[7] == long + 1 and max(lengths[:7] + lengths[8:]) < 10
    assert lengths == [len(row) for row in trainer.train_dataset["chosen_ids"]]
    file = next(Path(tmp_path / "cache").rglob("cache-*.arrow"))
    assert file.stat().st_size < 10 * 4 * sum(lengths)
    trainer.train()
    assert torch.tensor(history(trainer, "loss")).isfinite().all()


def test_a_batch_without_rows_is_refused(model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder, args=options(tmp_path, precompute_ref_log_probs=True), train_dataset=make_pairs()
    )
    trainer.train_dataset = Dataset.from_list(trainer.train_dataset.to_list()).remove_columns(list(REFERENCE_COLUMNS))
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True`, and the batch has no 'ref_chosen_logps'"):
        trainer.train()


@pytest.mark.lengthy
def test_the_key_is_the_same_in_every_process(model_folder, tmp_path):
    """Sets in an adapter's configuration have another order under another PYTHONHASHSEED."""
    program = (
        "import sys; from peft import LoraConfig, get_peft_model; from transformers import AutoModelForCausalLM; "
        "from otpo.training.reference_cache import reference_key; "
        "from datasets import Dataset; import torch; torch.manual_seed(0); "
        "model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "
        "LoraConfig(target_modules=['q_proj', 'k_proj', 'v_proj'])); "
        "names = ('prompt_ids', 'chosen_ids', 'rejected_ids'); "
        "print(reference_key(Dataset.from_dict({name: [[1]] for name in names}), model, ''))"
    )
    keys = {python("-c", program, model_folder, PYTHONHASHSEED=seed).stdout.split()[-1] for seed in "123"}
    assert len(keys) == 1


class Shouting(DataCollatorForPreference):
    def torch_call(self, examples):
        return super().torch_call([{**row, "chosen_ids": [*row["chosen_ids"], 5]} for row in examples])


def test_another_collator_is_asked_again(model_folder, tmp_path, stored_pairs, reference_passes):
    for collator, again in ((None, True), (Shouting(pad_token_id=0), True), (Shouting(pad_token_id=0), False)):
        reference_passes.clear()
        args = options(tmp_path, precompute_ref_log_probs=True, max_steps=1)
        trainer = OTPOTrainer(
            model_folder, args=args, data_collator=collator, train_dataset=stored_pairs(), peft_config=adapter()
        )
        assert (len(reference_passes) > 0) == again
        assert first_loss(trainer) == pytest.approx(0.6931, abs=1e-4)
