"""From the judged answers to a prompt to one pair, or to the reason why there is none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OUTCOMES = ("pair", "tie", "low", "failed")
"""What becomes of a prompt: a pair; answers that nothing tells apart; no answer that is good enough; no judgement."""


class Answer(NamedTuple):
    """What a model wrote.

    Attributes:
        text: Without the tokens that end it.
        ended: Whether the model ended it, rather than the limit of tokens.
    """

    text: str
    ended: bool

    @property
    def may_be_chosen(self) -> bool:
        """Whether a model may be taught to answer so: a text that stops anywhere, or is blank, is no example."""
        return self.ended and bool(self.text.strip())


@dataclass(frozen=True)
class PairingRule:
    """Which best and worst answers make a pair.

    Attributes:
        min_score_chosen: The least score of a chosen answer, rounding aside; None for any.
        min_margin: By how much the scores differ at least, >= 0, rounding aside. Scores that are equal never make a
            pair.
    """

    min_score_chosen: float | None = None
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_margin < float("inf"):
            raise ValueError(f"`min_margin` must be a finite number of at least 0, got {self.min_margin}.")
        if self.min_score_chosen is not None and not math.isfinite(self.min_score_chosen):
            raise ValueError(
                f"`min_score_chosen` must be a finite number, got {self.min_score_chosen}. Leave it out for any score."
            )


class Outcome(NamedTuple):
    """What becomes of a prompt.

    Attributes:
        kind: One of [`OUTCOMES`].
        reason: Why there is no pair; empty for a pair.
        chosen: Place of the best answer; None without a pair.
        rejected: Place of the worst answer; None without a pair.
    """

    kind: str
    reason: str = ""
    chosen: int | None = None
    rejected: int | None = None


def reaches(value: float, least: float) -> bool:
    """Whether a score or margin is at least `least`, rounding aside.

    0.9 - 0.8 reaches 0.1, in float32 too, in which many judges count: a millionth of `least` is let pass.
    """
    return value >= least or math.isclose(value, least, rel_tol=1e-6, abs_tol=1e-12)


def distinct(answers: Sequence[Answer]) -> list[Answer]:
    """The answers without repetitions, in the order of their first occurrence.

    Texts that differ in white space at their ends alone are one: a pair of them would state no preference. Of an
    answer that ended and the same text cut off, the one that ended stays.
    """
    found: dict[str, Answer] = {}
    for answer in answers:
        key = answer.text.strip()
        if key not in found or (answer.ended and not found[key].ended):
            found[key] = answer
    return list(found.values())


def before_judging(answers: Sequence[Answer]) -> Outcome | None:
    """The outcome of distinct answers that no judge has to look at; None where one has to."""
    if not any(answer.may_be_chosen for answer in answers):
        return Outcome("failed", "no answer is complete: each is blank or was cut off by `max_new_tokens`")
    if len(answers) < 2:
        return Outcome("tie", "all answers are the same")
    return None


def choose_pair(answers: Sequence[Answer], scores: Sequence[float], rule: PairingRule) -> Outcome:
    """The best answer and the worst one, if the scores tell them apart.

    Among equals the first is taken, which is as random as the sampling; of the worst, one that ended before one that
    was cut off, since the trainer teaches where a rejected answer ends, too.

    Args:
        answers: Distinct ones, of which one may be chosen.
        scores: One finite number each, higher is better.
        rule: What a pair needs.
    """
    places = range(len(answers))
    best = max((place for place in places if answers[place].may_be_chosen), key=lambda place: scores[place])
    others = [place for place in places if place != best]
    worst = min(others, key=lambda place: (scores[place], not answers[place].ended))
    margin = scores[best] - scores[worst]
    if margin <= 0:
        return Outcome("tie", "no answer is better than another")
    if not reaches(margin, rule.min_margin):
        return Outcome("tie", f"the scores differ by {margin:g}, less than `min_margin`")
    if rule.min_score_chosen is not None and not reaches(scores[best], rule.min_score_chosen):
        return Outcome("low", f"the best score is {scores[best]:g}, less than `min_score_chosen`")
    return Outcome("pair", "", best, worst)


def preference_row(
    row: int, prompt: Any, answers: Sequence[Answer], scores: Sequence[float], outcome: Outcome
) -> dict[str, Any]:
    """A pair as `otpo align` reads it: text where the prompt is text, messages where it is messages.

    Args:
        row: Number of the prompt in its dataset.
        prompt: Text, or messages.
        answers: Those that were judged.
        scores: Theirs.
        outcome: A pair's.
    """
    sides = {"chosen": outcome.chosen, "rejected": outcome.rejected}
    places = {side: place for side, place in sides.items() if place is not None}
    texts: dict[str, Any] = {side: answers[place].text for side, place in places.items()}
    if not isinstance(prompt, str):
        texts = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
    return {
        "prompt": prompt,
        **texts,
        **{f"score_{side}": scores[place] for side, place in places.items()},
        "row": row,
    }
