"""Callables as the trainer's `weighting`: what they are told as, what they look at, and `ld_alpha` beside them."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from helpers import make_pairs, make_trainer, options
from weighting_helpers import make_batch, with_weights

from otpo import OTPOTrainer
from otpo.transport.options import TransportOptions
from otpo.weighting import (
    WEIGHTINGS,
    PairBatch,
    TokenWeights,
    budget,
    columns,
    contrast,
    d2po,
    diff,
    ld,
    product,
    uniform,
)
from otpo.weighting.callables import same_weighting, values_of_callable
from otpo.weighting.optimal_transport import by_transport
from otpo.weighting.registry import WeightingKind, make_weighting, weighting_names
from otpo.weighting.token_values import GIVEN, UNMATCHED, TokenValues

NUMBERS = {"diff": UNMATCHED, "columns": GIVEN}


def trainer_of(folder: str, tmp_path: Any, own: Any, data: Any = None, **changes: Any) -> OTPOTrainer:
    data = make_pairs(4) if data is None else data
    return OTPOTrainer(folder, args=options(tmp_path, **changes), train_dataset=data, weighting=own)


def test_ld_alpha_beside_a_callable_is_refused(model_folder, tmp_path):
    """TRL's loss would apply it a second time, or to weights that know nothing of it."""
    message = (
        r"`ld_alpha=0\.5` beside a callable as `weighting`: .* `functools.partial\(otpo.weighting.ld, alpha=0.5\)`"
    )
    for name, own in (("ld", partial(ld, alpha=0.5)), ("otpo", uniform)):
        with pytest.raises(ValueError, match=message):
            trainer_of(model_folder, tmp_path, own, weighting=name, ld_alpha=0.5)
    assert trainer_of(model_folder, tmp_path, partial(ld, alpha=0.5)).ld_alpha is None


def test_a_callable_is_told_as_what_it_is(model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path, partial(d2po, gamma=0.5), weighting="d2po")
    assert trainer.describe_weighting() == "a weighting of your own"
    trainer.weighting = partial(d2po, gamma=0.98)
    assert trainer.describe_weighting() == "d2po, d2po_gamma 0.98"
    trainer.args = trainer.args.with_weighting("otpo*diff")
    trainer.weighting = make_weighting(trainer.args)
    assert trainer.describe_weighting().startswith("otpo*diff, ")
    trainer.weighting = partial(product, factors=[uniform, budget])
    assert trainer.describe_weighting() == "a weighting of your own"


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            lambda ones: ones.numpy(),
            TypeError,
            "returned a `ndarray` for its weights: return a tensor of",
        ),
        (lambda ones: ones.tolist(), TypeError, "returned a `list` for its weights"),
        (lambda ones: None, TypeError, "returned a `NoneType` for its weights"),
        (
            lambda ones: (ones, {"mine": 1.0}),
            TypeError,
            r"returned a `tuple` .*, or `TokenWeights\(weights",
        ),
        (lambda ones: ones + 1j, TypeError, "returned complex numbers for its weights"),
        (
            lambda ones: TokenWeights(ones, {"mine": ones[0, :3]}),
            ValueError,
            r"'mine' as a tensor of shape \(3,\)",
        ),
        (lambda ones: TokenWeights(ones, {"mine": "high"}), TypeError, "logs 'mine' as 'high': log a number"),
        (lambda ones: TokenWeights(ones, [1.0]), TypeError, r"returned \[1.0\] as numbers to log: .* in a dictionary"),  # pyright: ignore
        (
            lambda ones: -ones,
            FloatingPointError,
            r"Weights .*row\(s\) \d.* finite, or weights negative, after 0",
        ),
    ],
)
def test_what_are_no_weights(answer, error, message, model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path, lambda batch: answer(torch.ones_like(batch.logps)))
    with pytest.raises(error, match=message):
        trainer.train()


def test_what_is_no_function_is_refused_at_once(model_folder, tmp_path):
    with pytest.raises(TypeError, match=r"`weighting` must be a function of a batch of pairs, .* got 3\."):
        trainer_of(model_folder, tmp_path, 3)


@pytest.mark.parametrize("change", [{"ot_reg": 0.5}, {"weighting": "contrast"}, {"seed": 3, "weighting": "sampo"}])
def test_options_that_were_changed_later_are_refused(change, model_folder, tmp_path):
    """The trainer has its weighting already; the log would tell of one that nothing was trained by."""
    name = "sampo" if "seed" in change else "otpo"
    trainer = OTPOTrainer(model_folder, args=options(tmp_path, weighting=name), train_dataset=make_pairs(4))
    for field, value in change.items():
        setattr(trainer.args, field, value)
    with pytest.raises(ValueError, match=r"after the trainer was made, .* Make the trainer anew with these options"):
        trainer.train()
    trainer.args.weighting = "magic"
    with pytest.raises(ValueError, match=r"`weighting` must be one of .*, got 'magic'"):
        trainer.train()
    trainer.weighting = uniform  # one's own asks no options
    trainer.train()


def test_weightings_are_the_same_by_function_and_keywords(tmp_path):
    for name in ["otpo*d2po", *weighting_names()]:
        args = options(tmp_path, weighting=name, ld_alpha=0.5)
        assert same_weighting(make_weighting(args), make_weighting(args))
    sharp = TransportOptions(reg=0.1)
    pairs = [
        (uniform, budget),
        (partial(d2po, gamma=0.5), d2po),
        (partial(by_transport, options=sharp), partial(by_transport, options=TransportOptions())),
        (partial(contrast, options=sharp), partial(contrast, options=sharp, mix=0.5)),
        (partial(product, factors=[uniform]), partial(product, factors=[uniform, uniform])),
        (partial(ld, alpha=torch.ones(2)), partial(ld, alpha=torch.ones(2))),
    ]
    assert not any(same_weighting(*pair) or same_weighting(*pair[::-1]) for pair in pairs)


@pytest.mark.parametrize("weighting", [diff, partial(diff, base=0.5), partial(product, factors=[diff, columns])])
def test_a_callable_of_the_registry_gets_the_numbers_of_tokens(weighting, model_folder, tmp_path):
    pairs = with_weights(make_pairs(4))
    trainer = trainer_of(model_folder, tmp_path, weighting, pairs, max_steps=1, eval_strategy="no")
    assert trainer.train().global_step == 1


def test_diff_as_a_callable_is_diff_by_name(model_folder, tmp_path):
    def weights(trainer: OTPOTrainer) -> torch.Tensor:
        with torch.no_grad():
            return trainer.score_batch(trainer.model, trainer.collate(list(trainer.train_dataset))).weights

    named = make_trainer(model_folder, tmp_path, make_pairs(4), weighting="diff", diff_base=0.5)
    assert torch.equal(weights(trainer_of(model_folder, tmp_path, partial(diff, base=0.5))), weights(named))


def test_a_callable_names_what_it_looks_at(model_folder, tmp_path):
    def half(batch: PairBatch) -> torch.Tensor:
        return diff(batch, base=0.5)

    batch = dataclasses.replace(make_batch([3, 2]), token_values={})
    with pytest.raises(ValueError, match="names what it looks at in an attribute `token_values`, a tuple such as"):
        half(batch)
    assert values_of_callable(half) == ()
    half.token_values = (UNMATCHED,)  # pyright: ignore[reportFunctionMemberAccess]
    assert values_of_callable(half) == values_of_callable(partial(half)) == (UNMATCHED,)
    assert values_of_callable(partial(product, factors=[columns, half, diff])) == (GIVEN, UNMATCHED)
    trainer = trainer_of(model_folder, tmp_path, half, max_steps=1, eval_strategy="no")
    assert trainer.train().global_step == 1
    half.token_values = UNMATCHED  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(TypeError, match="`token_values` of a weighting must be a tuple of `TokenValues`, got Token"):
        values_of_callable(half)


def test_entries_of_ones_own_are_found_by_their_functions(monkeypatch):
    mine = TokenValues("mine", "nowhere:values")

    def weigh(batch: PairBatch) -> torch.Tensor:
        return batch.token_values["mine"]

    monkeypatch.setitem(WEIGHTINGS, "mine", WeightingKind(weigh, "h", "s", values=(mine,)))
    monkeypatch.setitem(WEIGHTINGS, "far", WeightingKind("nowhere:weigh", "h", "s", values=(mine,)))  # not imported
    assert values_of_callable(weigh) == (mine,) and values_of_callable(budget) == ()
