"""Who says which of two answers is better. None of the judges here needs a network."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from otpo.data.ecommerce.answers import check_answer

CHECKS = ("attribute", "price", "language", "format")
NO_JUDGE = "none"
"""In place of a judge's name: nobody compares answers, and the table has no win rates."""


class JudgeError(RuntimeError):
    """A judge raised, or gave something that is not a probability for each prompt."""


class Judge(Protocol):
    """Any callable of this form: a pairwise judge, or a reward model's `sigmoid(reward_a - reward_b)`."""

    def __call__(
        self,
        prompts: Sequence[str],
        answers_a: Sequence[str],
        answers_b: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> Sequence[float]:
        """How probably each of `answers_a` is better than that of `answers_b`, within [0, 1]; 0.5 is a tie.

        Args:
            prompts: N requests, as text.
            answers_a: N answers; one may be empty.
            answers_b: N other answers to the same requests.
            rows: N rows of the held-out data, see [`otpo.data.load_demo_preferences`].
        """
        ...


def checkers(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> list[float]:
    """The bundled data's own judge: the answer that is right in more of attribute, price, language, format wins.

    An empty answer is right in nothing. Exact and deterministic, and blind to style and to length.

    Raises:
        ValueError: A row is not a bundled one, so nobody knows its right answer.
    """
    if not all("answer" in row for row in rows):
        raise ValueError("'checkers' knows the bundled pairs alone: name another judge for pairs of a file, or 'none'")
    points = [
        [_points(row, answer) for row, answer in zip(rows, side, strict=True)] for side in (answers_a, answers_b)
    ]
    return [(1 + (a > b) - (a < b)) / 2 for a, b in zip(*points, strict=True)]


def judged(
    judge: Judge,
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> list[float]:
    """Asks a judge and checks what it says.

    Raises:
        JudgeError: It raised, or its answer is not `len(prompts)` finite numbers within [0, 1]; the message says at
            which prompt.
    """
    try:
        values = np.asarray(judge(prompts, answers_a, answers_b, rows), dtype=np.float64)
    except Exception as error:
        raise JudgeError(f"the judge raised {type(error).__name__}: {error}") from error
    if values.shape != (len(prompts),):
        raise JudgeError(f"the judge gave the shape {values.shape} for {len(prompts)} prompts")
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if bad.size:
        raise JudgeError(f"the judge gave {values[bad[0]]} for prompt {bad[0]} ({bad.size} in all), not within [0, 1]")
    return values.tolist()


def load_judge(name: str) -> Judge | None:
    """`"checkers"`, `"none"`, `"reward:FOLDER"` (a reward model), or a callable as `package.module:name`.

    Raises:
        ValueError: There is no such callable, or no model in the folder.
    """
    if name in ("checkers", NO_JUDGE):
        return checkers if name == "checkers" else None
    if name.startswith("reward:"):
        from .reward_judge import RewardJudge

        return RewardJudge(name.removeprefix("reward:"))
    module, _, attribute = name.partition(":")
    try:
        judge = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`judge` must be 'checkers', 'none', 'reward:FOLDER' or 'package.module:callable', got {name!r}: {error}."
        ) from None
    if not callable(judge):
        raise ValueError(f"`judge` must be callable, {name!r} is a {type(judge).__name__}.")
    return cast(Judge, judge)


def _points(row: Mapping[str, Any], answer: str) -> int:
    results = check_answer(row, answer)
    return sum(results[name] for name in CHECKS) if answer.strip() else 0
