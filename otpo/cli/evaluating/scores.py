"""Scores of lm-eval with 95% intervals, and the difference of two models on the same examples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Z = 1.959963984540054
"""Standard errors on each side of a 95% interval."""


class Interval(NamedTuple):
    """A value and the ends of its 95% interval; None where there is no interval."""

    value: float
    low: float | None
    high: float | None


class Score(NamedTuple):
    """A metric of a task.

    Attributes:
        value: Over all examples.
        stderr: lm-eval's standard error, or None.
        values: The metric of each example, by the example's number, where `value` is their mean.
        higher_is_better: As lm-eval says, or None.
    """

    value: float
    stderr: float | None
    values: dict[int, float] | None
    higher_is_better: bool | None


Scores = dict[tuple[str, str], Score]
"""By task and metric."""


def collect_scores(results: Mapping[str, Any]) -> Scores:
    """Reads the results of `lm_eval.simple_evaluate`, called with `log_samples=True`."""
    scores: Scores = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or isinstance(value, bool | str):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            stderr = None if isinstance(stderr, str) else stderr
            samples = [it for it in results.get("samples", {}).get(task, []) if it.get("filter", "none") == chosen]
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            scores[task, name] = Score(float(value), stderr, _values(samples, metric, value), better)
    return scores


def _values(samples: Sequence[Mapping[str, Any]], metric: str, mean: float) -> dict[int, float] | None:
    values = {it["doc_id"]: it.get(metric) for it in samples}
    numbers = {place: float(value) for place, value in values.items() if isinstance(value, int | float)}
    if not numbers or len(numbers) < len(values):
        return None
    return numbers if math.isclose(sum(numbers.values()) / len(numbers), mean, abs_tol=1e-9) else None


def interval(score: Score) -> Interval:
    """Wilson's interval where each example is right or wrong, else the normal one; none of a single example."""
    values = None if score.values is None else list(score.values.values())
    if values and set(values) <= {0.0, 1.0}:
        return _wilson(score.value, len(values))
    stderr = _standard_error(values) if values else score.stderr
    return _normal(score.value, stderr)


def difference(left: Score, right: Score) -> Interval:
    """How much higher `right` is.

    Where both have a value of each example, and of the same ones, the interval is that of the mean of the examples'
    differences: what is hard for both models cancels out.
    """
    change = right.value - left.value
    if left.values is not None and right.values is not None and left.values.keys() == right.values.keys():
        changes = [right.values[place] - value for place, value in left.values.items()]
        return _normal(change, _standard_error(changes))
    if left.stderr is None or right.stderr is None:
        return Interval(change, None, None)
    return _normal(change, math.hypot(left.stderr, right.stderr))


def _standard_error(values: Sequence[float]) -> float | None:
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _normal(value: float, stderr: float | None) -> Interval:
    if not stderr or not math.isfinite(stderr):  # 0 where all examples are alike, which would claim certainty
        return Interval(value, None, None)
    return Interval(value, value - Z * stderr, value + Z * stderr)


def _wilson(share: float, count: int) -> Interval:
    """Wilson, 1927: unlike the normal interval it stays within 0 and 1, and is no point where all are right."""
    scale = 1 + Z**2 / count
    centre = (share + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
