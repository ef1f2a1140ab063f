"""The win rate that answers of equal length would have, by AlpacaEval 2's regression.

Source: Dubois et al. 2024, arXiv 2404.04475, and `alpaca_eval/metrics/glm_winrate.py`. Shapes: N prompts.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_MOST_STEPS = 100


class LengthControlled(NamedTuple):
    """A fit: the length-controlled win rate in [0, 1], and the coefficients `theta`, `phi` and `psi`."""

    win_rate: float
    model: float
    length: float
    difficulty: float


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    difficulty: ArrayLike | None = None,
    ridge: float = 1e-3,
) -> LengthControlled:
    """Fits how much of a preference the length explains, and takes that part out.

        p(x) = sigmoid(theta + phi * tanh((len - len_baseline) / std(len - len_baseline)) + psi * difficulty(x))
        win rate = mean of p(x) with the term of the length at zero

    As AlpacaEval does, differences are divided by their sample standard deviation and not centred, and the
    preferences may be probabilities. Unlike it, the penalty is a small ridge in place of a cross-validated L1 norm,
    there are no rows of gamed baselines, and the difficulties, which AlpacaEval publishes for its own 805 prompts,
    are the caller's or left out.

    Args:
        preferences: `(N,)` how probably the model's answer beats the baseline's, within [0, 1].
        lengths: `(N,)` lengths of the model's answers, in any unit, >= 0.
        baseline_lengths: `(N,)` the baseline's, in the same unit.
        difficulty: `(N,)` a number a prompt, higher where models lose more or less often; None for no such term.
        ridge: Weight of half the squared norm of the coefficients beside the summed log-likelihood, > 0. It keeps
            them finite where one model always wins.

    Returns:
        The win rate and the coefficients; `difficulty` is 0 without difficulties.

    Raises:
        ValueError: No prompts, uneven shapes, a value outside its range or not finite.
    """
    target = _column("preferences", preferences)
    own, other = _column("lengths", lengths, target.size), _column("baseline_lengths", baseline_lengths, target.size)
    if target.min() < 0 or target.max() > 1:
        raise ValueError(f"`preferences` must be within [0, 1], got {target.min():g} to {target.max():g}.")
    if min(own.min(), other.min()) < 0:
        raise ValueError(f"Lengths must be at least 0, got {min(own.min(), other.min()):g}.")
    if not ridge > 0:
        raise ValueError(f"`ridge` must be above 0, got {ridge}.")
    hard = np.zeros_like(target) if difficulty is None else _column("difficulty", difficulty, target.size)
    features = np.stack([np.ones_like(target), length_feature(own, other), hard], axis=1)
    theta, phi, psi = fit_logistic(features, target, ridge)
    return LengthControlled(float(_sigmoid(theta + psi * hard).mean()), theta, phi, psi)


def length_feature(lengths: Floats, baseline_lengths: Floats) -> Floats:
    """`tanh((len - len_baseline) / std)`, `(N,)`; zeros where all differences are equal, which tell nothing apart."""
    difference = lengths - baseline_lengths
    spread = difference.std(ddof=1) if difference.size > 1 else 0.0
    # Differences that are equal but for rounding have a spread of rounding.
    if spread <= 1e-12 * max(1.0, float(np.abs(difference).max())):
        return np.zeros_like(difference)
    return np.tanh(difference / spread)


def fit_logistic(features: Floats, target: Floats, ridge: float) -> tuple[float, ...]:
    """Coefficients `(K,)` of a ridge logistic regression of probabilities `(N,)` on `(N, K)`, by Newton's method."""
    coefficients = np.zeros(features.shape[1])
    loss = _loss(coefficients, features, target, ridge)
    for _ in range(_MOST_STEPS):
        predicted = _sigmoid(features @ coefficients)
        gradient = features.T @ (predicted - target) + ridge * coefficients
        curvature = (features * (predicted * (1 - predicted))[:, None]).T @ features + ridge * np.eye(len(gradient))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-8 and _loss(coefficients - size * step, features, target, ridge) > loss:
            size /= 2
        coefficients = coefficients - size * step
        loss = _loss(coefficients, features, target, ridge)
        if np.abs(step).max() < 1e-10:
            break
    return tuple(coefficients.tolist())


def _loss(coefficients: Floats, features: Floats, target: Floats, ridge: float) -> float:
    scores = features @ coefficients
    return float((np.logaddexp(0, scores) - target * scores).sum() + ridge / 2 * coefficients @ coefficients)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))


def _column(name: str, values: ArrayLike, size: int | None = None) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not column.size or size not in (None, column.size):
        raise ValueError(f"`{name}` must hold one number for each prompt, got the shape {column.shape}.")
    if not np.isfinite(column).all():
        raise ValueError(f"`{name}` holds {int((~np.isfinite(column)).sum())} values that are not finite.")
    return column
