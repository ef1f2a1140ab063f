"""A run: prompts are answered block by block, judged, paired, noted in the ledger; the pairs are written at last."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.data.preferences import RowError

from .judges import Judge, JudgeError, judged
from .ledger import Ledger, read_entries
from .pairing import OUTCOMES, Answer, Outcome, PairingRule, before_judging, choose_pair, distinct, preference_row
from .prompts import CARRIED, find_prompt, prompt_tokens
from .sampling import Sampler


@dataclass(frozen=True)
class PairMaker:
    """What a run is made of.

    Attributes:
        sampler: Answers prompts.
        tokenizer: Of the model that answers.
        judge: Scores answers.
        rule: What a pair needs.
        batch_size: Prompts that are answered at a time, >= 1.
        longest_prompt: Tokens that a prompt may have; None for any number.
    """

    sampler: Sampler
    tokenizer: Any
    judge: Judge
    rule: PairingRule
    batch_size: int
    longest_prompt: int | None = None

    def run(
        self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], ledger: Ledger, done: Callable[[int], None]
    ) -> None:
        """Brings the ledger to its end.

        A block that was begun is answered as a whole again, so that a run which was killed makes the batches of one
        that was not, and with them the same answers, bit by bit.

        Args:
            rows: Of the dataset.
            numbers: Number of each row, which its random numbers are made from.
            ledger: Where each prompt's outcome goes; prompts that are there stay as they are.
            done: Called with the number of prompts that are done after each block.

        Raises:
            RowError: The chat template can't write a prompt; the message names its row.
        """
        for begin in range(0, len(rows), self.batch_size):
            block = range(begin, min(begin + self.batch_size, len(rows)))
            if any(numbers[place] not in ledger.entries for place in block):
                ledger.add(self._entries([rows[place] for place in block], [numbers[place] for place in block]))
            done(block.stop)

    def _entries(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """What the ledger keeps of a block of prompts, in their order."""
        prompts: list[Any] = []
        tokens: list[list[int]] = []
        for row, number in zip(rows, numbers, strict=True):
            prompts.append(find_prompt(row))
            try:
                tokens.append(prompt_tokens(self.tokenizer, prompts[-1], row))
            except ValueError as error:
                raise RowError(f"Row {number} of the prompts {error}.") from error
        fits = [place for place, prompt in enumerate(tokens) if self._problem(prompt) is None]
        answered = self.sampler([tokens[place] for place in fits], [numbers[place] for place in fits]) if fits else []
        answers = dict(zip(fits, answered, strict=True))
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            if place in answers:
                yield judge_answers(self.judge, self.rule, number, prompts[place], answers[place], row)
            else:
                yield _entry(number, Outcome("failed", str(self._problem(tokens[place]))))

    def _problem(self, prompt: Sequence[int]) -> str | None:
        if not prompt:
            return "the prompt has no tokens"
        if self.longest_prompt is not None and len(prompt) > self.longest_prompt:
            return (
                f"the prompt has {len(prompt)} tokens, and with `max_new_tokens` the model's positions allow "
                f"{self.longest_prompt}"
            )
        return None


def judge_answers(
    judge: Judge, rule: PairingRule, number: int, prompt: Any, answers: Sequence[Answer], row: Mapping[str, Any]
) -> dict[str, Any]:
    """The ledger's entry of one prompt: its outcome, each distinct answer with its score, and the pair.

    Args:
        judge: Scores the distinct answers.
        rule: What a pair needs.
        number: Of the row.
        prompt: Text or messages.
        answers: All of them.
        row: What the judge also gets.
    """
    found = distinct(answers)
    outcome = before_judging(found)
    if outcome is not None:
        return _entry(number, outcome, found)
    try:
        scores = judged(judge, prompt, [answer.text for answer in found], row)
    except JudgeError as error:
        return _entry(number, Outcome("failed", str(error)), found)
    outcome = choose_pair(found, scores, rule)
    entry = _entry(number, outcome, found, scores)
    if outcome.kind == "pair":
        carried = {name: row[name] for name in CARRIED if row.get(name)}
        entry["pair"] = preference_row(number, prompt, found, scores, outcome) | carried
    return entry


def write_pairs(path: Path, entries: Mapping[int, Mapping[str, Any]], numbers: Sequence[int]) -> None:
    """Writes the pairs of a finished run, in the order of its prompts; a file that is there is replaced at once."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for number in numbers:
            if "pair" in entries[number]:
                file.write(json.dumps(entries[number]["pair"], ensure_ascii=False) + "\n")
    os.replace(part, path)


@dataclass(frozen=True)
class Summary:
    """What came out of the prompts that are in a ledger.

    Attributes:
        counts: Prompts by outcome, one number for each of [`OUTCOMES`].
        reasons: Why prompts have no pair, by how many have the reason.
        distinct: Mean number of distinct answers to a prompt; NaN where nothing was answered.
        cut: Share of the distinct answers that `max_new_tokens` cut off; NaN likewise.
    """

    counts: dict[str, int]
    reasons: Counter[str]
    distinct: float
    cut: float


def summarise(entries: Mapping[int, Mapping[str, Any]]) -> Summary:
    """The [`Summary`] of a ledger's entries."""
    counts = Counter(entry["outcome"] for entry in entries.values())
    reasons = Counter(entry["reason"] for entry in entries.values() if entry["reason"])
    answers = [entry["answers"] for entry in entries.values() if entry["answers"]]
    total = sum(map(len, answers))
    nan = float("nan")
    return Summary(
        {kind: counts[kind] for kind in OUTCOMES},
        reasons,
        total / len(answers) if answers else nan,
        sum(not answer["ended"] for found in answers for answer in found) / total if total else nan,
    )


def read_summary(path: Path) -> Summary:
    """The [`Summary`] of a ledger that no run has open."""
    return summarise(read_entries(path))


def _entry(
    number: int, outcome: Outcome, answers: Sequence[Answer] = (), scores: Sequence[float] | None = None
) -> dict[str, Any]:
    kept = [{"text": answer.text, "ended": answer.ended} for answer in answers]
    for answer, score in zip(kept, scores or (), strict=False):
        answer["score"] = score  # pyright: ignore[reportArgumentType]
    return {"row": number, "outcome": outcome.kind, "reason": outcome.reason, "answers": kept}
