"""Where `OTPOTrainer` takes its weights from, and what a weighting is shown of a batch."""

import math
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
    option_dict,
    options,
    train_and_evaluate,
)
from peft import PromptTuningConfig
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from written_loss import load, uneven_pairs

from otpo import OTPOTrainer, PairBatch, TokenWeights


class Doubling(OTPOTrainer):
    def token_weights(self, batch: PairBatch) -> Tensor:
        return torch.full(batch.mask.shape, 2.0)


def double(batch: PairBatch) -> TokenWeights:
    return TokenWeights(torch.full(batch.mask.shape, 2.0), {"weights/two": 2.0})


@pytest.mark.parametrize(
    ("trainer_class", "weighting"),
    [(Doubling, None), (OTPOTrainer, double), (OTPOTrainer, lambda batch: batch.mask * 2)],
    ids=["subclass", "callable", "integers"],
)
def test_weights_of_two_are_twice_the_beta(trainer_class, weighting, model_folder, tmp_path):
    """Bitwise: a factor of two only moves exponents."""
    got = train_and_evaluate(
        trainer_class(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    )
    args = DPOConfig(**option_dict(tmp_path, beta=0.2))
    want = train_and_evaluate(DPOTrainer(model_folder, args=args, train_dataset=make_pairs()))
    assert got.losses == want.losses
    assert_same_parameters(got.after, want.after)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    assert history(got.trainer, *names) == history(want.trainer, *names)
    if weighting is double:
        assert history(got.trainer, "weights/two") == [(2.0,)] * 4


def test_no_gradient_goes_through_the_weights(model_folder, other_model_folder, tmp_path):
    scale = torch.nn.Parameter(torch.ones(32))
    seen: list[PairBatch] = []

    @torch.enable_grad()
    def learned(batch: PairBatch) -> Tensor:
        seen.append(batch)
        return (batch.hidden_states * scale).sum(2).sigmoid() + batch.logps.exp()

    def frozen(batch: PairBatch) -> Tensor:
        return learned(batch).detach()

    gradients = []
    for weighting in (learned, frozen):
        trainer = OTPOTrainer(
            model_folder,
            load(other_model_folder),
            options(tmp_path),
            train_dataset=make_pairs(),
            weighting=weighting,
        )
        trainer.compute_loss(trainer.model, collate(trainer, [0, 1, 2])).backward()
        gradients.append({name: value.grad for name, value in trainer.model.named_parameters()})
    assert scale.grad is None
    assert not seen[0].hidden_states.requires_grad and not seen[0].logps.requires_grad
    assert_same_parameters(*gradients)


@pytest.mark.parametrize(
    "weighting",
    [
        lambda batch: torch.ones(len(batch.mask)),
        lambda batch: torch.ones(len(batch.mask), 1),
        lambda batch: torch.ones(batch.mask.size(0) // 2, batch.mask.size(1)),
        lambda batch: torch.ones(()),
        lambda batch: torch.ones(*batch.mask.shape, 1),
    ],
    ids=["one_a_row", "broadcastable", "half_the_rows", "scalar", "three_dimensions"],
)
def test_weights_of_another_shape_are_refused(weighting, model_folder, tmp_path):
    trainer = OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
    with pytest.raises(ValueError, match=r"weights of shape .* the batch's mask has \(8, "):
        trainer.train()


def test_weights_outside_the_mask_are_ignored(model_folder, tmp_path):
    """As `TokenWeights` promises. `1 / (batch.positions + 1)` is a user's first idea, and infinite in the prompt."""

    def inverse(batch: PairBatch) -> Tensor:
        return torch.where(batch.mask, hashed_weights(batch), torch.tensor([math.nan]))

    runs = [
        train_and_evaluate(
            OTPOTrainer(model_folder, args=options(tmp_path), train_dataset=make_pairs(), weighting=weighting)
        )
        for weighting in (hashed_weights, inverse)
    ]
    assert runs[0].log == runs[1].log
    assert_same_parameters(runs[0].after, runs[1].after)


def test_a_batch_says_what_the_model_said(model_folder, tmp_path):
    """The states predict the tokens: the head's log-softmax of them is the batch's log-probabilities."""
    batches: list[PairBatch] = []
    trainer = OTPOTrainer(
        model_folder,
        args=options(tmp_path),
        train_dataset=uneven_pairs(),
        weighting=lambda batch: batches.append(batch) or batch.mask.float(),
    )
    inputs = collate(trainer, list(range(7)))
    trainer.compute_loss(trainer.model, inputs)
    (batch,) = batches
    _check_alignment(trainer.model, batch)
    assert torch.equal(batch.mask, inputs["completion_mask"][:, 1:].bool())
    assert torch.equal(batch.token_ids, inputs["input_ids"][:, 1:])
    assert batch.logps[~batch.mask].eq(0).all()
    assert batch.step == 0


def _check_alignment(model: Any, batch: PairBatch) -> None:
    with torch.no_grad():
        logps = model.get_output_embeddings()(batch.hidden_states.float()).log_softmax(2)
    logps = logps.gather(2, batch.token_ids.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(batch.logps[batch.mask], logps[batch.mask], rtol=1e-5, atol=1e-5)


def test_prompt_tuning(model_folder, tmp_path):
    """Virtual tokens stand before the real ones; masks, tokens, states and log-probabilities must still line up."""
    batches: list[PairBatch] = []

    class Looking(OTPOTrainer):
        def token_weights(self, batch: PairBatch) -> Tensor | TokenWeights:
            batches.append(batch)
            return super().token_weights(batch)

    trainer = Looking(
        model_folder,
        args=options(tmp_path, ot_reg=0.05),
        train_dataset=make_pairs(),
        eval_dataset=make_pairs(4, seed=3),
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    run = train_and_evaluate(trainer)
    assert moved(run) == ["prompt_encoder.default.embedding.weight"]
    assert all(math.isfinite(loss) for loss in run.losses)
    assert 0 < run.evaluation["eval_weights/ess"] < 1
    for batch in batches:
        assert batch.hidden_states.shape[:2] == batch.mask.shape == batch.logps.shape
        _check_alignment(trainer.model.get_base_model(), batch)


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
