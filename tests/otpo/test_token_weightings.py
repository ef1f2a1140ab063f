"""The weightings of log-probabilities, of an alignment, of the user's columns, and their products, in closed form."""

import dataclasses
import math

import pytest
import torch
from helpers import options
from weighting_helpers import make_batch, values_of

from otpo.weighting import (
    WEIGHTINGS,
    PairBatch,
    budget,
    columns,
    confpo,
    diff,
    length,
    otpo,
    product,
    sampo,
    surprisal,
    uniform,
)
from otpo.weighting.methods import within_budget
from otpo.weighting.registry import make_weighting, says_nothing, weighting_names
from otpo.weighting.registry import values_of as kinds_of_values

BATCH = make_batch([6, 1, 4, 2, 5, 4])  # pairs (6, 2), (1, 5), (4, 4)
TENSORS = ("mask", "token_ids", "logps", "hidden_states", "reference_logps")
NEW = ("contrast", "confpo", "surprisal", "diff", "columns", "otpo*diff", "contrast*surprisal*columns")


def batch_of(rows: list[list[float]], **names: list[list[float]]) -> PairBatch:
    """Responses whose tokens have these log-probabilities, from the first position on."""
    width = max(map(len, rows))
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])

    def padded(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in values], dtype=torch.float64)

    values = {name: padded(each) for name, each in names.items() if name != "reference"}
    reference = padded(names["reference"]) if "reference" in names else None
    return PairBatch(mask, mask.long(), padded(rows), torch.zeros(*mask.shape, 2), 0, {}, reference, values)


def part(batch: PairBatch, rows: list[int]) -> PairBatch:
    picked = {name: getattr(batch, name)[rows] for name in TENSORS}
    return dataclasses.replace(
        batch, **picked, token_values={name: value[rows] for name, value in batch.token_values.items()}
    )


# What each of them is


def test_confpo_selects_what_is_less_probable_than_the_mean_probability():
    """Not than the mean logarithm: of 0.9, 0.6 and 0.1 the mean is 0.53, the geometric one 0.38."""
    probabilities = [[0.9, 0.5, 0.1], [0.4, 0.4, 0.4, 0.2]]
    batch = batch_of([[math.log(each) for each in row] for row in probabilities])
    assert confpo(batch)[0][batch.mask[0]].tolist() == [0, 0, 1]
    assert confpo(batch)[1].tolist() == [0, 0, 0, 1]
    high = batch_of([[math.log(each) for each in row] for row in ([0.9, 0.45, 0.05, 0.45], [0.9, 0.1])])
    assert confpo(high)[0].tolist() == [0, 1, 1, 1]  # the geometric mean, 0.31, is below two of these


def test_confpo_leaves_out_pairs_in_which_a_response_has_no_such_token():
    batch = batch_of([[-0.1, -2.0], [-0.1, -2.0], [-0.5], [-3.0, -0.2]])  # the first pair's rejected has one token
    got = confpo(batch)
    assert got[0].eq(0).all() and got[2].eq(0).all()
    assert got[1].tolist() == [0, 1] and got[3].tolist() == [1, 0]


def test_surprisal_is_the_references_scaled_to_the_budget():
    reference = [[-1.0, -3.0, -4.0], [-2.0, 0.0]]
    batch = batch_of([[-9.0] * 3, [-9.0] * 2], reference=reference)
    got = surprisal(batch)
    torch.testing.assert_close(got[0], torch.tensor([0.25, 0.75, 1.0], dtype=torch.float64))
    torch.testing.assert_close(got[1], torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    sure = dataclasses.replace(batch, reference_logps=torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(surprisal(sure), (budget(batch) * batch.mask).double())
    with pytest.raises(ValueError, match=r"`weighting='surprisal'` is made of .* no reference is asked"):
        surprisal(dataclasses.replace(batch, reference_logps=None))


@pytest.mark.parametrize("base", [0.0, 0.2, 1.0])
def test_diff_counts_what_is_unmatched_scaled_to_the_budget(base):
    marks = [[0.0, 1, 1, 0, 0], [0.0, 0, 1], [0.0, 0], [0.0, 0, 0]]  # the second pair's are all matched
    batch = batch_of([[-1.0] * len(row) for row in marks], unmatched=marks)
    got = diff(batch, base=base)
    for row, own in enumerate(marks):
        values = [1.0 if mark else base for mark in own]
        shorter = int(batch.shorter[row])
        total = sum(values)
        want = [value * shorter / total if total else shorter / len(own) for value in values]
        torch.testing.assert_close(got[row][batch.mask[row]], torch.tensor(want, dtype=torch.float64))
    if base == 1.0:
        torch.testing.assert_close(got, (budget(batch) * batch.mask).double())


def test_columns_are_what_was_given():
    given = [[0.0, 2.5, 1.0], [1.0, 1.0]]
    batch = batch_of([[-1.0] * 3, [-1.0] * 2], given_weights=given)
    assert columns(batch)[0].tolist() == given[0] and columns(batch)[1][:2].tolist() == given[1]
    ones = dataclasses.replace(BATCH, token_values={"given_weights": torch.ones(6, 9)})
    assert torch.equal(columns(ones), uniform(BATCH))


@pytest.mark.parametrize("weighting", [diff, columns])
def test_values_that_no_dataset_has_brought_are_missed(weighting):
    with pytest.raises(ValueError, match=r"The batch has no .* pass it to the trainer as `train_dataset`"):
        weighting(dataclasses.replace(BATCH, token_values={}))


# Products


def test_a_product_is_multiplied_and_scaled_to_the_budget(tmp_path):
    args = options(tmp_path, weighting="otpo*diff", ot_reg=0.1, diff_base=0.5)
    assert args.describe_weighting() == "otpo*diff, ot_reg 0.1, ot_reg_m 0.2, ot_cost_scale release, diff_base 0.5"
    answer = make_weighting(args)(BATCH)
    plain = otpo(BATCH, reg=0.1)
    raw = plain.values * diff(BATCH, base=0.5)
    for row in range(6):
        want = raw[row] * BATCH.shorter[row] / raw[row].sum()
        torch.testing.assert_close(answer.values[row], want)
    assert answer.metrics.keys() == plain.metrics.keys()
    torch.testing.assert_close(answer.values.sum(1), BATCH.shorter[:, 0].float())


def test_products_with_uniform_scale_a_weighting_to_the_budget():
    got = product(BATCH, factors=[uniform, length])
    torch.testing.assert_close(got.values, budget(BATCH) * BATCH.mask)
    once, twice = (values_of(product(BATCH, factors=each)) for each in ([sampo, confpo], [confpo, sampo]))
    torch.testing.assert_close(once, twice)


def test_a_product_of_nothing_is_that_of_budget():
    def odd(batch):
        return (batch.positions % 2).float()

    def even(batch):
        return 1 - odd(batch)

    torch.testing.assert_close(product(BATCH, factors=[odd, even]).values, budget(BATCH) * BATCH.mask)


def test_names_of_products():
    names = weighting_names()
    assert "otpo*diff" in names and "otpo" in names and list(names) == sorted(WEIGHTINGS)
    assert not any(name in names for name in ("otpo*", "*", "", "otpo*otop", "otpo diff", None, 3))
    assert [kind.name for kind in kinds_of_values("diff*columns*diff")] == ["unmatched", "given_weights"]
    assert says_nothing("diff_base", "otpo*confpo") and not says_nothing("diff_base", "otpo*diff")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_budget_survives_any_scale(dtype):
    """Values whose sum is a rounding error, or so large that its inverse underflows, keep their proportions."""
    batch = make_batch([4, 3])
    for scale in (1e-30, 1e30) if dtype != torch.float16 else (1e-3, 1e3):
        values = scale * torch.ones(2, 9, dtype=dtype)
        got = within_budget(values, batch)
        torch.testing.assert_close(got, (budget(batch) * batch.mask).to(dtype), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e38, 3e38])
def test_values_near_the_ends_of_float32_keep_their_proportions(scale):
    """Their sum overflows, or is less than the smallest normal number."""
    batch = make_batch([6, 4])
    values = torch.full((2, 9), scale)
    values[:, ::2] /= 2
    want = within_budget(torch.where(values == values.max(), 1.0, 0.5), batch)
    torch.testing.assert_close(within_budget(values, batch), want, rtol=0.2 if scale < 1e-40 else 1e-6, atol=0)
    assert set((within_budget(0 * values, batch) - budget(batch) * batch.mask).flatten().tolist()) == {0.0}
    torch.testing.assert_close(
        product(batch, factors=[lambda _: values] * 2).values,
        want**2 / (want**2).sum(1, True) * 4,
        rtol=0.4 if scale < 1e-40 else 1e-5,
        atol=0,
    )


def test_scaling_by_the_largest_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(BATCH.mask.shape, generator=generator) * BATCH.mask
    total = values.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(within_budget(values, BATCH), values * (BATCH.shorter / total))
    assert within_budget(torch.ones(2, 0), make_batch([0, 0], width=0)).shape == (2, 0)
    masks = product(BATCH, factors=[lambda batch: batch.mask, lambda batch: batch.positions + 1]).values
    torch.testing.assert_close(masks.sum(1), BATCH.shorter[:, 0].float())


# What all of them are


@pytest.mark.parametrize("name", NEW)
def test_a_batch_is_its_pairs(name, tmp_path):
    weighting = make_weighting(options(tmp_path, weighting=name, ot_reg=0.1))
    together = values_of(weighting(BATCH)) * BATCH.mask
    for pair in range(3):
        rows = [pair, pair + 3]
        alone = part(BATCH, rows)
        torch.testing.assert_close(values_of(weighting(alone)) * alone.mask, together[rows])


@pytest.mark.parametrize("name", NEW)
def test_empty_and_one_token_answers_at_odd_places(name, tmp_path):
    weighting = make_weighting(options(tmp_path, weighting=name))
    for lengths in ([3, 0, 1, 0, 2, 1], [0, 0], [1, 7], [9, 1]):
        batch = make_batch(lengths)
        noise = torch.where(batch.mask, batch.logps, torch.nan)
        poisoned = dataclasses.replace(batch, logps=noise, reference_logps=noise)
        got = values_of(weighting(poisoned))[batch.mask]
        assert got.isfinite().all() and (got >= 0).all()
        if name not in ("confpo", "columns"):
            sums = (values_of(weighting(batch)) * batch.mask).sum(1)
            torch.testing.assert_close(sums, batch.shorter[:, 0].float())


@pytest.mark.parametrize("name", NEW)
def test_padding_makes_no_difference(name, tmp_path):
    weighting = make_weighting(options(tmp_path, weighting=name, ot_reg=0.1))
    wide = {each: torch.nn.functional.pad(getattr(BATCH, each), (4, 2)) for each in TENSORS if each != "hidden_states"}
    wide["hidden_states"] = torch.nn.functional.pad(BATCH.hidden_states, (0, 0, 4, 2))
    values = {each: torch.nn.functional.pad(value, (4, 2)) for each, value in BATCH.token_values.items()}
    shifted = dataclasses.replace(BATCH, **wide, token_values=values)
    torch.testing.assert_close(values_of(weighting(shifted))[shifted.mask], values_of(weighting(BATCH))[BATCH.mask])


def test_values_within_a_budget_have_their_gradient():
    values = torch.rand(BATCH.mask.shape, dtype=torch.float64, requires_grad=True)

    def plain(values):
        kept = values.masked_fill(~BATCH.mask, 0.0)
        return kept * (BATCH.shorter / kept.sum(1, keepdim=True))

    toward = torch.rand(BATCH.mask.shape, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((f(values) * toward).sum(), values)[0]
        for f in (lambda each: within_budget(each, BATCH), plain)
    )
    torch.testing.assert_close(got, want)
    assert got.abs().sum() > 0
