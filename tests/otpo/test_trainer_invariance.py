"""What the weights and the training may and may not depend on: padding, company, draws, accumulation, resuming."""

from typing import Any

import pytest
import torch
from helpers import (
    assert_same_parameters,
    collate,
    hashed_weights,
    history,
    make_pairs,
    moved,
    options,
    train_and_evaluate,
)
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from written_loss import SGD, Written, load, uneven_pairs

from otpo import OTPOTrainer, PairBatch, TokenWeights


class Recording(OTPOTrainer):
    """Keeps each response's weights, by step and by its pair's tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[tuple[Any, ...], Tensor] = {}
        super().__init__(*args, **kwargs)

    def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
        answer = super().token_weights(batch)
        values = answer.values if isinstance(answer, TokenWeights) else answer
        tokens = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.token_ids, batch.mask, strict=True)]
        pairs = len(tokens) // 2
        for row, (weights, mask) in enumerate(zip(values, batch.mask, strict=True)):
            other = tokens[(row + pairs) % (2 * pairs)]
            self.seen[batch.step, tokens[row], other] = weights[mask].clone()
        return answer


class LeftPadded(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for row, count in enumerate(batch["attention_mask"].sum(1).tolist()):
            for name in ("input_ids", "attention_mask", "completion_mask"):
                batch[name][row] = batch[name][row].roll(batch[name].size(1) - count)
        return batch


@pytest.mark.parametrize("weighting", ["otpo", "budget", "length", "sampo", "ld"])
def test_weights_do_not_depend_on_padding_or_company(weighting, model_folder, tmp_path, tokenizer):
    """Rotary positions are relative and padding is masked, so states differ by float32 rounding alone."""
    data = uneven_pairs()
    found = []
    for size, collator in (
        (7, None),
        (1, None),
        (3, DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=32)),
        (7, LeftPadded(pad_token_id=tokenizer.pad_token_id)),
    ):
        trainer = Recording(
            model_folder,
            args=options(tmp_path, weighting=weighting, ld_alpha=0.5, ot_reg=0.05, per_device_eval_batch_size=size),
            train_dataset=data,
            eval_dataset=data,
            data_collator=collator,
        )
        trainer.evaluate()
        found.append(trainer.seen)
    assert len(found[0]) == 14
    assert len({tuple(value.tolist()) for value in found[0].values()}) > 5
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_sampo_draws_by_seed_and_step(model_folder, tmp_path):
    def draws(**changes: Any) -> dict[tuple[Any, ...], Tensor]:
        settings = {"weighting": "sampo", "per_device_train_batch_size": 16, "seed": 1, **changes}
        trainer = Recording(model_folder, args=options(tmp_path, **settings), train_dataset=make_pairs())
        trainer.train()
        return trainer.seen

    def by_step(found: dict[tuple[Any, ...], Tensor]) -> list[dict[tuple[Any, ...], list[float]]]:
        return [
            {key[1:]: value.tolist() for key, value in found.items() if key[0] == step}
            for step in sorted({key[0] for key in found})
        ]

    one = by_step(draws())
    assert len(one) == 4 and all(len(step) == 32 for step in one)
    assert one[0] != one[1] and one[1] != one[2]
    assert one == by_step(draws())
    assert one[0] != by_step(draws(seed=2))[0]
    # One step of four micro-batches draws what one of a single micro-batch does.
    accumulated = by_step(draws(per_device_train_batch_size=4, gradient_accumulation_steps=4))
    assert accumulated == one


def test_sampo_draws_once_for_policy_and_reference(model_folder, other_model_folder, tmp_path):
    """The loss of one draw: what the draw leaves out of the policy, it leaves out of the reference."""
    trainer = Recording(
        model_folder,
        load(other_model_folder),
        options(tmp_path, weighting="sampo"),
        train_dataset=make_pairs(),
    )
    batch = collate(trainer, list(range(8)))
    loss = trainer.compute_loss(trainer.model, batch).item()
    chosen, rejected = (list(trainer.seen.values())[part] for part in (slice(8), slice(8, 16)))
    values = torch.zeros(16, batch["input_ids"].size(1) - 1, dtype=torch.float64)
    values[batch["completion_mask"][:, 1:].bool()] = torch.cat([*chosen, *rejected]).double()
    assert set(values.unique().tolist()) == {0.0, 1.0}
    written = Written(load(model_folder), load(other_model_folder), lambda _: values)
    assert loss == pytest.approx(written(batch).item(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["otpo", "budget", "sampo"])
def test_gradient_accumulation_is_a_larger_batch(weighting, model_folder, tmp_path):
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        args = options(
            tmp_path,
            **SGD,
            weighting=weighting,
            ot_reg=0.05,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        runs.append(train_and_evaluate(OTPOTrainer(model_folder, args=args, train_dataset=make_pairs())))
    assert moved(runs[0])
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-5, atol=1e-6)
    for name, value in runs[0].after.items():
        torch.testing.assert_close(runs[1].after[name], value, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "weighting"),
    [
        ({"ot_reg": 0.05}, None),
        ({"weighting": "sampo"}, None),
        ({"ot_reg": 0.05, "precompute_ref_log_probs": True}, None),
        ({}, hashed_weights),
    ],
    ids=["otpo", "sampo", "otpo-precomputed", "callable"],
)
def test_resuming_repeats_the_trajectory(settings, weighting, model_folder, tmp_path):
    """Bitwise: six steps at once, or the last three from the checkpoint after the third."""

    def make() -> OTPOTrainer:
        args = options(tmp_path, **settings, max_steps=6, save_strategy="steps", save_steps=3)
        return OTPOTrainer(model_folder, args=args, train_dataset=make_pairs(), weighting=weighting)

    straight = train_and_evaluate(make())
    resumed = train_and_evaluate(make(), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_parameters(resumed.after, straight.after)
    keys = ("step", "loss", "grad_norm", "weights/ess", "rewards/margins_unweighted")
    assert history(resumed.trainer, *keys) == history(straight.trainer, *keys)
    assert len(history(resumed.trainer, *keys)) == 6
