"""Mean, standard deviation and paired bootstrap intervals over seeds and prompts. Shapes: S seeds, N prompts."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Summary(NamedTuple):
    """Mean over seeds and sample standard deviation, 0 for a single seed."""

    mean: float
    std: float


class Interval(NamedTuple):
    """A difference and its two-sided percentile interval."""

    difference: float
    low: float
    high: float


def summarise(values: list[float]) -> Summary:
    """Mean and sample standard deviation of one number a seed; a `ValueError` for none."""
    if not values:
        raise ValueError("There are no values to summarise.")
    return Summary(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)


def paired_bootstrap(
    difference: Callable[[Indices, Indices], float],
    seeds: int,
    prompts: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a difference between two runs that share their seeds and prompts.

    Seeds and prompts are drawn again with replacement, the same ones for both runs, so what makes a prompt hard or a
    seed lucky cancels. With few seeds the interval says little about seeds: with one, nothing.

    Args:
        difference: Of the chosen seeds `(S,)` and prompts `(N,)`, as indices.
        seeds: S, >= 1.
        prompts: N, >= 1.
        resamples: Draws, >= 1; from a generator of its own with a fixed seed, so the interval is always the same.
        level: Share of the draws that the interval holds, within (0, 1).

    Raises:
        ValueError: An argument is outside its range.
    """
    if min(seeds, prompts, resamples) < 1 or not 0 < level < 1:
        raise ValueError(
            "`seeds`, `prompts` and `resamples` must be at least 1 and `level` within (0, 1), got "
            f"{seeds}, {prompts}, {resamples} and {level}."
        )
    generator = np.random.default_rng(0)
    draws = [
        difference(generator.integers(seeds, size=seeds), generator.integers(prompts, size=prompts))
        for _ in range(resamples)
    ]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference(np.arange(seeds), np.arange(prompts))), float(low), float(high))
