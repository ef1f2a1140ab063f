"""What `OTPOTrainer` refuses, what it drops, and that a bad step spoils neither parameters nor checkpoints."""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from helpers import (
    collate,
    folder_bytes,
    hashed_weights,
    make_pairs,
    make_plain_pairs,
    option_dict,
    options,
    parameters,
    poison,
    train_and_evaluate,
    with_images,
)
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from otpo import OTPOConfig, OTPOTrainer
from otpo.weighting import WEIGHTINGS, TokenWeights

LONG = "red " * 100


def make(model: Any, tmp_path: Path, data: Any, **changes: Any) -> OTPOTrainer:
    return OTPOTrainer(model, args=options(tmp_path, **changes), train_dataset=data)


def bits(values: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Bytes of parameters, which compare NaN with NaN."""
    return {name: value.numpy().tobytes() for name, value in values.items()}


# Options


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ot_reg", "ot_reg_m", "ot_tolerance"])
def test_options_that_must_be_positive_and_finite(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"`{name}` must be a positive finite number, got {value}\."):
        options(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "otop"}, r"`weighting` must be one of \['budget', .*'uniform'\], got 'otop'.*callable"),
        ({"weighting": hashed_weights}, "`weighting` must be one of .* pass a callable as the trainer's argument"),
        ({"ot_cost_scale": "max"}, "`ot_cost_scale` must be 'release' or 'pairwise', got 'max'"),
        ({"ot_cost": "l1"}, "`ot_cost` must be 'euclidean' or 'cosine', got 'l1'"),
        ({"d2po_gamma": 0.0}, r"`d2po_gamma` must be within \(0, 1\], got 0.0"),
        ({"d2po_gamma": 1.1}, r"`d2po_gamma` must be within \(0, 1\], got 1.1"),
        ({"ot_max_iterations": 0}, "`ot_max_iterations` must be at least 1, got 0"),
        ({"ld_alpha": 1.5}, r"`ld_alpha` must be within \[0, 1\], got 1.5"),
        ({"ld_alpha": -0.1}, r"`ld_alpha` must be within \[0, 1\], got -0.1"),
        ({"ld_alpha": math.nan}, r"`ld_alpha` must be within \[0, 1\], got nan"),
        ({"weighting": "ld"}, r"`weighting='ld'` needs `ld_alpha`, got None. Set it within \[0, 1\]"),
    ],
    ids=[
        "unknown_weighting",
        "callable_weighting",
        "cost_scale",
        "cost",
        "gamma_zero",
        "gamma_large",
        "no_iterations",
        "ld_alpha_large",
        "ld_alpha_negative",
        "ld_alpha_nan",
        "ld_without_alpha",
    ],
)
def test_options_out_of_range(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **settings)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_every_weighting_trains(name, model_folder, tmp_path):
    run = train_and_evaluate(make(model_folder, tmp_path, make_pairs(), weighting=name, ld_alpha=0.0))
    assert all(math.isfinite(loss) for loss in run.losses) and run.losses[3] < run.losses[0]


def test_options_of_dpo_are_refused(model_folder, tmp_path):
    args = DPOConfig(**option_dict(tmp_path))
    with pytest.raises(TypeError, match="`args` must be an `OTPOConfig`, got a `DPOConfig`"):
        OTPOTrainer(model_folder, args=args, train_dataset=make_pairs())


def test_name_of_a_weighting_as_the_argument(model_folder, tmp_path):
    with pytest.raises(TypeError, match=r"Set `OTPOConfig\(weighting='otpo'\)`.* takes a callable"):
        OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting="otpo")


@dataclass
class OnCPU(OTPOConfig):
    use_cpu: bool = True  # the default options are for a GPU


@pytest.mark.parametrize("as_object", [False, True], ids=["folder", "object"])
def test_default_options(as_object, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("otpo.trainer.OTPOConfig", OnCPU)
    model = AutoModelForCausalLM.from_pretrained(model_folder) if as_object else model_folder
    trainer = OTPOTrainer(model, train_dataset=make_pairs())
    assert trainer.args.output_dir == f"{Path(model_folder).name}-OTPO"
    assert isinstance(trainer.args, OTPOConfig)
    assert (trainer.args.weighting, trainer.args.ot_reg, trainer.args.ot_reg_m) == ("otpo", 1.0, 0.2)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_precomputing_for_a_stream(split, model_folder, tmp_path):
    data = {"train_dataset": make_pairs(), "eval_dataset": make_pairs()}
    data[f"{split}_dataset"] = data[f"{split}_dataset"].to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`precompute_ref_log_probs=True`.*(?s:.)*`precompute_ref_log_probs=False`"):
        OTPOTrainer(model_folder, args=options(tmp_path, precompute_ref_log_probs=True), **data)


# Columns


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("split", "name"),
    [("train", "train"), ("eval", "eval"), ("several", "second")],
)
def test_missing_columns_are_named(split, name, stream, model_folder, tmp_path):
    broken: Any = make_pairs().rename_columns({"chosen": "good", "rejected": "bad"})
    broken = broken.to_iterable_dataset() if stream else broken
    data = {
        "train": {"train_dataset": broken},
        "eval": {"train_dataset": make_pairs(), "eval_dataset": broken},
        "several": {"train_dataset": make_pairs(), "eval_dataset": {"first": make_pairs(), "second": broken}},
    }[split]
    message = (
        rf"The {name} dataset lacks the column\(s\) \['chosen', 'rejected'\]; it has \['bad', 'good', 'prompt'\]"
        r".*dataset.rename_column\(old, new\)"
    )
    with pytest.raises(ValueError, match=message):
        OTPOTrainer(model_folder, args=options(tmp_path), **data)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_datasets_without_rows(stream, model_folder, tmp_path):
    empty = IterableDataset.from_generator(lambda: iter(())) if stream else make_pairs().select([])
    with pytest.raises(ValueError, match="train dataset has no rows"):
        make(model_folder, tmp_path, empty)


def test_no_dataset(model_folder, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make(model_folder, tmp_path, None)


# Pairs that can't be trained on


def pairs_of_which_some_are_empty() -> Dataset:
    """Rows 1 and 4 have a prompt that fills forty tokens; row 6 has no prompt and a completion of one token."""
    rows = [(f"cotton {i} ", "yes it ships", "no") for i in range(8)]
    rows[1] = rows[4] = (LONG, "yes", "no")
    rows[6] = ("", "", "no red box")
    return make_plain_pairs(rows)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_empty_completions_are_dropped_and_counted(stream, mode, model_folder, tmp_path):
    data: Any = pairs_of_which_some_are_empty()
    trainer = make(
        model_folder,
        tmp_path,
        data.to_iterable_dataset() if stream else data,
        max_length=40,
        truncation_mode=mode,
        per_device_train_batch_size=1,
        max_steps=5 if mode == "keep_start" else 7,
    )
    run = train_and_evaluate(trainer)
    assert len(run.losses) == trainer.args.max_steps and all(math.isfinite(loss) for loss in run.losses)
    # The end of a sequence keeps the completion however long the prompt is.
    want = {"empty": 3 if mode == "keep_start" else 1}
    assert dict(trainer.dropped_pairs["train"]) == want
    kept = [row["prompt"] for row in trainer.train_dataset]
    assert [f"cotton {i} " in kept for i in range(8)] == [i not in (1, 4, 6) for i in range(8)]


def test_dropped_pairs_by_dataset(model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path, max_length=40),
        train_dataset=make_plain_pairs([("a", "b", "c")]),
        eval_dataset={"some": pairs_of_which_some_are_empty(), "none": make_plain_pairs([("a", "b", "c")])},
    )
    counts = {name: dict(dropped) for name, dropped in trainer.dropped_pairs.items()}
    assert counts == {"train": {}, "some": {"empty": 3}, "none": {}}
    assert len(trainer.eval_dataset["some"]) == 5


IDENTICAL: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "outright": ({}, ("a box", " of cotton", " of cotton")),
    "both_only_the_end": ({}, ("a box", "", "")),
    "after_truncation": ({"max_length": 20}, ("a box", " red" * 30 + " yes", " red" * 30 + " no")),
    "after_truncation-keep_end": (
        {"max_length": 20, "truncation_mode": "keep_end"},
        ("a box", " yes" + " red" * 30, " no" + " red" * 30),
    ),
    "after_the_first_token_without_prompt": ({}, ("", "a", "b")),
}


def pairs_with_identical_rows(case: str) -> Dataset:
    """Row 0 is empty within twenty tokens, rows 3 and 5 are identical."""
    rows = [(f"cotton {i}", " yes", " no") for i in range(7)]
    rows[0] = (LONG, "yes", "no")
    rows[3] = rows[5] = IDENTICAL[case][1]
    return make_plain_pairs(rows)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("case", IDENTICAL)
def test_identical_pairs_are_refused_by_row(case, stream, model_folder, tmp_path):
    data: Any = pairs_with_identical_rows(case)
    settings = IDENTICAL[case][0]
    limit = rf" within max_length={settings.get('max_length', 128)},"
    with pytest.raises(ValueError, match=rf"Row 3 of the train dataset.*{limit}.*`drop_identical_pairs=True`"):
        data = data.to_iterable_dataset() if stream else data
        make(model_folder, tmp_path, data, drop_identical_pairs=False, **settings).train()


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("case", IDENTICAL)
def test_identical_pairs_are_dropped_on_demand(case, stream, model_folder, tmp_path):
    data: Any = pairs_with_identical_rows(case)
    settings = {"max_length": 20, **IDENTICAL[case][0], "drop_identical_pairs": True}
    kept = 4 if settings.get("truncation_mode") != "keep_end" else 5
    trainer = make(
        model_folder,
        tmp_path,
        data.to_iterable_dataset() if stream else data,
        **settings,
        per_device_train_batch_size=1,
        max_steps=kept,
    )
    trainer.train()
    assert trainer.dropped_pairs["train"]["identical"] == 2
    assert sum(1 for _ in trainer.train_dataset) == kept


def test_identical_pairs_of_the_evaluation_dataset(model_folder, tmp_path):
    with pytest.raises(ValueError, match="Row 3 of the second dataset"):
        OTPOTrainer(
            model_folder,
            args=options(tmp_path),
            train_dataset=make_pairs(),
            eval_dataset={"first": make_pairs(), "second": pairs_with_identical_rows("outright")},
        )


def test_no_pair_is_left(model_folder, tmp_path):
    data = make_plain_pairs([(LONG, "yes", "no")] * 3)
    with pytest.raises(ValueError, match=r"No pair of the train dataset is left: .*'empty': 3.* of 3.*max_length=20"):
        make(model_folder, tmp_path, data, max_length=20)


def test_no_pair_of_a_stream_is_left(model_folder, tmp_path):
    """It shows only when the stream is read; a training of no step must not look like one that went well."""
    data = make_plain_pairs([(LONG, "yes", "no")] * 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="No pair of the train dataset is left"):
        make(model_folder, tmp_path, data, max_length=20).train()


# Numbers that are not finite


ODD = "~"  # in no other text


def pairs_with_one_odd(side: str) -> Dataset:
    """Row 0 is empty within forty tokens; row 5 alone has the odd token, on one side; row 2 shares the other."""
    rows = [(f"cotton {i} costs", f" ten {i}", f" twenty {i}") for i in range(7)]
    rows[0] = (LONG, "yes", "no")
    odd = f" a{ODD}box"
    rows[5] = ("the box", odd, " blue") if side == "chosen" else ("the box", " blue", odd)
    rows[2] = ("the box", " red", " blue") if side == "chosen" else ("the box", " blue", " red")
    return make_plain_pairs(rows)


class At(TrainerCallback):
    """Calls a function at the start or the end of the step after `done` steps."""

    def __init__(self, event: str, done: int, function: Any) -> None:
        def call(args, state, control, **kwargs):
            if state.global_step == done:
                function()

        setattr(self, event, call)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_that_is_not_finite_is_named(side, model_folder, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make(model, tmp_path, pairs_with_one_odd(side), max_length=40)
    poison(model, tokenizer.convert_tokens_to_ids(ODD))
    rows = [list(trainer.train_dataset["prompt"]).index(f"cotton {i} costs") for i in (1, 3, 4)]
    odd = next(i for i, row in enumerate(trainer.train_dataset) if ODD in row[side])
    batch = collate(trainer, [rows[0], rows[1], odd, rows[2]])
    with pytest.raises(FloatingPointError, match=r"(?i)states.* pair\(s\) \[2\] of the micro-batch \(row\(s\) 5 of"):
        trainer.compute_loss(trainer.model, batch)


def test_a_step_that_is_not_finite_changes_nothing(model_folder, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make(
        model,
        tmp_path / "out",
        pairs_with_one_odd("chosen"),
        max_length=40,
        per_device_train_batch_size=6,
        save_strategy="steps",
        save_steps=1,
    )
    kept: dict[str, Any] = {}

    def spoil() -> None:
        poison(model, tokenizer.convert_tokens_to_ids(ODD))
        kept["parameters"] = bits(parameters(model))
        kept["checkpoint"] = folder_bytes(tmp_path / "out" / "checkpoint-2")

    trainer.add_callback(At("on_step_begin", 2, spoil))
    with pytest.raises(FloatingPointError, match=r"row\(s\) 5 of the training.*after 2 optimizer step.*No update"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert bits(parameters(model)) == kept["parameters"]
    assert len(kept["checkpoint"]) > 5
    assert folder_bytes(tmp_path / "out" / "checkpoint-2") == kept["checkpoint"]
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def nan_of_the_second_pair(batch: Any) -> torch.Tensor:
    weights = hashed_weights(batch)
    weights[1, batch.mask[1]] = math.nan
    return weights


def infinite_once(batch: Any) -> torch.Tensor:
    return torch.where((batch.positions == 0) & batch.mask, math.inf, 1.0)


@pytest.mark.parametrize("weighting", [nan_of_the_second_pair, infinite_once], ids=["nan", "inf"])
def test_weights_that_are_not_finite(weighting, model_folder, tmp_path):
    """Once they reach an update, every parameter is NaN: the step must stop before it, and say what was wrong."""
    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    before = bits(parameters(trainer.model))
    with pytest.raises(FloatingPointError, match=r"(?i)weights.*not finite.*after 0 optimizer step") as error:
        trainer.train()
    if weighting is nan_of_the_second_pair:
        assert "pair(s) [1]" in str(error.value)
    assert bits(parameters(trainer.model)) == before


@pytest.mark.parametrize("precompute", [False, True], ids=["online", "precomputed"])
def test_a_reference_that_is_not_finite(precompute, model_folder, tmp_path, tokenizer):
    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    poison(reference, tokenizer.convert_tokens_to_ids(ODD))
    trainer = OTPOTrainer(
        model_folder,
        reference,
        options(tmp_path, max_length=40, per_device_train_batch_size=6, precompute_ref_log_probs=precompute),
        train_dataset=pairs_with_one_odd("rejected"),
    )
    before = bits(parameters(trainer.model))
    with pytest.raises(FloatingPointError, match=r"(?i)reference.*row\(s\) 5 of the training.*not finite"):
        trainer.train()
    assert bits(parameters(trainer.model)) == before


def test_spoilt_parameters_are_not_saved(model_folder, tmp_path):
    """NaN between steps: neither a checkpoint nor a save over an earlier one."""
    trainer = make(
        model_folder, tmp_path / "out", make_pairs(), save_strategy="steps", save_steps=1, save_total_limit=1
    )
    kept: dict[str, Any] = {}

    def spoil() -> None:
        kept["checkpoint"] = folder_bytes(tmp_path / "out" / "checkpoint-1")
        trainer.save_model(str(tmp_path / "mine"))
        kept["mine"] = folder_bytes(tmp_path / "mine")
        with torch.no_grad():
            trainer.model.lm_head.weight[3, 4] = math.nan

    trainer.add_callback(At("on_step_end", 2, spoil))
    with pytest.raises(FloatingPointError, match=r"parameters that are not finite after 2 optimizer step.*not saved"):
        trainer.train()
    assert "model.safetensors" in kept["checkpoint"] and "model.safetensors" in kept["mine"]
    assert folder_bytes(tmp_path / "out" / "checkpoint-1") == kept["checkpoint"]
    assert not (tmp_path / "out" / "checkpoint-2").exists()

    for folder in ("mine", "new"):
        with pytest.raises(FloatingPointError, match="not finite"):
            trainer.save_model(str(tmp_path / folder))
    assert folder_bytes(tmp_path / "mine") == kept["mine"]
    assert not (tmp_path / "new").exists()


def test_infinite_parameters_are_not_saved(model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, make_pairs())
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.save_model(str(tmp_path / "new"))


# Empty sides that only the collator can see


def losses_and_gradients(trainer: OTPOTrainer, batch: dict[str, Any]) -> tuple[float, bool]:
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = [value.grad for value in trainer.model.parameters() if value.grad is not None]
    return loss.item(), all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "sft", "aot"])
@pytest.mark.parametrize("weighting", ["otpo", "budget", "length", "sampo"])
def test_empty_sides_at_the_collator(weighting, loss_type, model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, make_pairs(), weighting=weighting, loss_type=[loss_type])
    batch = collate(trainer, [0, 1, 2, 3])
    batch["completion_mask"][0] = 0  # the chosen side of pair 0
    batch["completion_mask"][5] = 0  # the rejected side of pair 1
    batch["completion_mask"][[2, 6]] = 0  # both of pair 2
    loss, finite = losses_and_gradients(trainer, batch)
    assert math.isfinite(loss) and finite
    trainer._metrics["train"] = {name: list(values) for name, values in trainer._metrics["train"].items()}
    assert all(math.isfinite(value) for values in trainer._metrics["train"].values() for value in values)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_empty_sides_of_images(loss_type, vision_folder, tmp_path):
    """Vision datasets are tokenized in the collator, so no pair of theirs is dropped beforehand."""
    rows = [("<image>a box", " red", " blue"), ("<image>the box", "", " no"), ("<image>today", " a", "")]
    trainer = make(
        vision_folder,
        tmp_path,
        with_images(make_plain_pairs(rows)),
        loss_type=[loss_type],
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=3,
    )
    batch = dict(trainer.data_collator([trainer.train_dataset[row] for row in range(3)]))
    assert sorted(batch["completion_mask"].sum(1).tolist())[:2] == [0, 0]
    loss, finite = losses_and_gradients(trainer, batch)
    assert math.isfinite(loss) and finite
    run = train_and_evaluate(trainer)
    assert all(math.isfinite(loss) for loss in run.losses)


# The reference


def test_a_reference_that_is_not_the_policys_copy_stops_before_the_first_step(model_folder, tmp_path):
    """A model changed in memory: its copy is loaded from the folder, without the change."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    before = parameters(model)
    trainer = make(model, tmp_path, make_pairs())
    with pytest.raises(RuntimeError, match=r"differ from the policy's by .* nats a token.* pass `ref_model`"):
        trainer.train()
    assert bits(parameters(trainer.model)) == bits(before)


def test_a_reference_of_ones_own_may_be_another_model(model_folder, other_model_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(other_model_folder)
    trainer = OTPOTrainer(model_folder, other, options(tmp_path, max_steps=1), train_dataset=make_pairs())
    trainer.train()
    assert trainer.state.global_step == 1


def test_precomputed_rows_of_data_in_memory_lie_where_every_process_looks(model_folder, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs = make_pairs()
    assert not pairs.cache_files
    for _ in range(2):
        trainer = make(model_folder, tmp_path / "out", pairs, precompute_ref_log_probs=True)
        assert "ref_chosen_logps" in trainer.train_dataset.column_names
        assert len(list((tmp_path / "cache/otpo").glob("cache-*.arrow"))) == 1


# Differences that are no faults


def with_dropout(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.5)
    assert model.config.attention_dropout == 0.5
    return model


@pytest.mark.parametrize(
    "noise", [{"disable_dropout": False}, {"neftune_noise_alpha": 50.0}], ids=lambda n: next(iter(n))
)
def test_noise_of_training_is_no_other_reference(noise, model_folder, tmp_path):
    trainer = make(with_dropout(model_folder), tmp_path, make_pairs(), max_steps=1, **noise)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_changed_model_is_found_behind_noise(model_folder, tmp_path):
    model = with_dropout(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    with pytest.raises(RuntimeError, match="differ from the policy's"):
        make(model, tmp_path, make_pairs(), disable_dropout=False).train()


@pytest.mark.parametrize("between", ["training", "steps_by_hand"])
def test_training_twice(between, model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, make_pairs(), learning_rate=0.1)
    if between == "training":
        trainer.train()
    else:
        trainer.model.train()
        trainer.compute_loss(trainer.model, collate(trainer, [0, 1, 2, 3])).backward()
        torch.optim.SGD(trainer.model.parameters(), lr=1.0).step()
    trainer.train()
    assert trainer.state.global_step == 4


# Weightings that do more than they are asked


def writes_into_the_mask(batch: Any) -> torch.Tensor:
    weights = hashed_weights(batch)
    for tensor in (batch.mask, batch.token_ids, batch.logps):
        tensor.zero_()
    return weights


def test_what_a_weighting_is_given_is_a_copy(model_folder, tmp_path):
    losses = [
        train_and_evaluate(
            OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
        ).losses
        for weighting in (hashed_weights, writes_into_the_mask)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda batch: batch.hidden_states.mul_(0.0), "hidden_states"),
        (lambda batch: batch.inputs["input_ids"].zero_(), r"inputs\['input_ids'\]"),
        (lambda batch: batch.inputs["attention_mask"][:, 0].zero_(), r"inputs\['attention_mask'\]"),
    ],
    ids=["states", "ids", "view"],
)
def test_writing_into_what_is_lent_is_refused(write, name, model_folder, tmp_path):
    def weighting(batch: Any) -> torch.Tensor:
        write(batch)
        return hashed_weights(batch)

    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    with pytest.raises(ValueError, match=rf"has written into `batch.{name}`.*clone"):
        trainer.train()


# Arguments


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_a_dictionary_of_splits(stream, model_folder, tmp_path):
    data: Any = {"train": make_pairs(), "test": make_pairs(4)}
    data = IterableDatasetDict({k: v.to_iterable_dataset() for k, v in data.items()}) if stream else DatasetDict(data)
    with pytest.raises(TypeError, match=r"`Dataset` or `IterableDataset`, got `\w*DatasetDict`.*dataset\['test'\]"):
        make(model_folder, tmp_path, data)
    OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), eval_dataset=data).evaluate()


def test_a_stream_that_is_precomputed_is_refused_in_trls_words(model_folder, tmp_path):
    with pytest.raises(ValueError, match="is not supported with IterableDataset"):
        make(model_folder, tmp_path, make_pairs().to_iterable_dataset(), precompute_ref_log_probs=True)


def test_arguments_are_shown_by_name():
    ours, trls = (inspect.signature(trainer.__init__).parameters for trainer in (OTPOTrainer, DPOTrainer))
    assert list(ours) == [*trls, "weighting"]
    assert all(ours[name].default == trls[name].default for name in trls)


@pytest.mark.parametrize("as_object", [False, True], ids=["folder", "object"])
def test_a_layer_that_is_not_there_is_refused_before_anything_is_read(as_object, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder) if as_object else model_folder
    read = []
    data = IterableDataset.from_generator(lambda: iter(read.append(1) or []))
    with pytest.raises(ValueError, match=r"`hidden_layer` must be within \[-3, 2\] .* 2 layers, got 99"):
        make(model, tmp_path, data, hidden_layer=99)
    assert not read


@pytest.mark.parametrize("split", ["train", "eval"])
def test_lists_are_no_datasets(split, model_folder, tmp_path):
    data: Any = {"train_dataset": make_pairs(), "eval_dataset": make_pairs(4)}
    data[f"{split}_dataset"] = data[f"{split}_dataset"].to_list()
    with pytest.raises(TypeError, match=rf"{split}.* must be a `Dataset` or `IterableDataset`, got `list`.*from_list"):
        OTPOTrainer(model_folder, args=options(tmp_path), **data)


@pytest.mark.parametrize("name", ["loss", "rewards/margins", "weights/ess", "rewards/chosen_unweighted"])
def test_numbers_of_a_weighting_have_names_of_their_own(name, model_folder, tmp_path):
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path),
        train_dataset=make_pairs(),
        weighting=lambda batch: TokenWeights(hashed_weights(batch), {name: 5.0}),
    )
    with pytest.raises(ValueError, match=f"The weighting logs a number as '{name}', which the trainer logs itself"):
        trainer.train()
