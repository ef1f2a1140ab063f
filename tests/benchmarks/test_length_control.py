"""The length-controlled win rate in cases whose answer is known, and the paired bootstrap."""

import numpy as np
import pytest

from benchmarks.ablation.length_control import length_controlled_win_rate, length_feature
from benchmarks.ablation.statistics import paired_bootstrap, summarise

TINY = 1e-9
NOISE = np.random.default_rng(0)
OWN, OTHER = NOISE.integers(10, 400, 200).astype(float), NOISE.integers(10, 400, 200).astype(float)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("theta", [-1.5, 0.0, 0.7])
@pytest.mark.parametrize("phi", [-2.0, 0.0, 3.0])
def test_length_is_taken_out(theta, phi):
    """Preferences made by the model itself: the fit finds its coefficients, and lengths leave no trace."""
    difference = OWN - OTHER
    preferences = sigmoid(theta + phi * np.tanh(difference / np.std(difference, ddof=1)))
    fit = length_controlled_win_rate(preferences, OWN, OTHER, ridge=TINY)
    assert fit[:3] == pytest.approx((sigmoid(theta), theta, phi), abs=1e-7)


def test_no_length_effect_gives_the_raw_win_rate():
    preferences = NOISE.integers(0, 2, 200).astype(float)
    fit = length_controlled_win_rate(preferences, OWN, OWN, ridge=TINY)
    assert fit.win_rate == pytest.approx(preferences.mean(), abs=1e-8)
    assert fit.length == 0
    assert length_controlled_win_rate(preferences, OWN + 7.3, OWN, ridge=TINY).length == 0


def test_swapping_the_models_swaps_the_rates():
    preferences = NOISE.random(200)
    hard = NOISE.normal(size=200)
    fit = length_controlled_win_rate(preferences, OWN, OTHER, hard)
    back = length_controlled_win_rate(1 - preferences, OTHER, OWN, hard)
    assert fit.win_rate + back.win_rate == pytest.approx(1, abs=1e-9)
    assert fit[1:] == pytest.approx((-back.model, back.length, -back.difficulty), abs=1e-8)


def test_difficulty_is_kept():
    hard = NOISE.normal(size=200)
    preferences = sigmoid(0.4 + 2 * length_feature(OWN, OTHER) - 1.2 * hard)
    fit = length_controlled_win_rate(preferences, OWN, OTHER, hard, ridge=TINY)
    assert fit == pytest.approx((sigmoid(0.4 - 1.2 * hard).mean(), 0.4, 2, -1.2), abs=1e-7)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_always_won_stays_finite(won):
    fit = length_controlled_win_rate(np.full(50, won), OWN[:50], OTHER[:50])
    assert fit.win_rate == pytest.approx(won, abs=1e-3)
    assert np.isfinite(fit).all()


def test_separable_by_length_stays_finite():
    fit = length_controlled_win_rate(OWN > OTHER, OWN, OTHER)
    assert np.isfinite(fit).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": []}, "`preferences` must hold one number for each prompt"),
        ({"preferences": [0.5, 1.5]}, r"within \[0, 1\], got 0.5 to 1.5"),
        ({"preferences": [0.5, np.nan]}, "holds 1 values that are not finite"),
        ({"lengths": [1.0]}, "`lengths` must hold one number"),
        ({"lengths": [1.0, -1.0]}, "at least 0, got -1"),
        ({"ridge": 0.0}, "`ridge` must be above 0"),
    ],
)
def test_bad_input(changes, message):
    good = {"preferences": [0.0, 1.0], "lengths": [1.0, 2.0], "baseline_lengths": [2.0, 2.0]}
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(**{**good, **changes})


def test_summary():
    assert summarise([1.0, 3.0]) == pytest.approx((2, np.sqrt(2)))
    assert summarise([4.0]) == (4, 0)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_bootstrap_interval():
    """A constant gain has no spread although prompts differ; of noise the interval is the normal one."""
    base = NOISE.normal(size=(3, 100))
    constant = paired_bootstrap(lambda s, n: ((base + 0.5) - base)[np.ix_(s, n)].mean(), 3, 100)
    assert constant == pytest.approx((0.5, 0.5, 0.5))
    noise = NOISE.normal(size=(1, 400))
    found = paired_bootstrap(lambda s, n: noise[np.ix_(s, n)].mean(), 1, 400, resamples=4000)
    half = 1.96 * noise.std() / 20
    assert (found.low, found.high) == pytest.approx((noise.mean() - half, noise.mean() + half), abs=0.01)
    assert found == paired_bootstrap(lambda s, n: noise[np.ix_(s, n)].mean(), 1, 400, resamples=4000)
    with pytest.raises(ValueError, match="at least 1"):
        paired_bootstrap(lambda s, n: 0.0, 0, 4)
