"""Prompts with constraints, each with an answer that keeps them; held-out wordings are in no training prompt."""

import json
import random
from collections.abc import Mapping
from typing import Any

from .checks import CONSTRAINTS
from .words import ADJECTIVES, ADVERBS, GROUPS, ITEMS, KEYWORDS, LANGUAGE_NAMES, LANGUAGES, SUBJECTS, VERBS

SPLITS = ("train", "test", "test_templates")
MIX = {"count": 0.8, "format": 0.7, "language": 0.3, "keyword": 0.6}
"""How often a prompt sets each constraint."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ITEMS = range(2, 8)
_LENGTHS = range(6, 13)
_TEST_SHARE = 5  # every so many-th set of words is held out

# The last wording of each is the held-out one, all others are trained on.
LIST = (
    "Name {n}{group}.",
    "List {n}{group}.",
    "Give me {n}{group}.",
    "Write down {n}{group}.",
    "I am looking for {n}{group}. Which come to mind?",
)
SENTENCE = (
    "Write a sentence about a {subject}.",
    "Write one sentence in which a {subject} appears.",
    "Make up a sentence about a {subject}.",
    "Compose a single sentence about a {subject}.",
    "In one sentence, tell me something about a {subject}.",
)
FORMATS = {
    "commas": (
        "Separate them by commas.",
        "Write them on one line, with commas between them.",
        "Use a comma-separated list.",
        "Put commas between the items.",
        "I need them comma-separated on a single line.",
    ),
    "bullets": (
        "Use bullet points.",
        "Write a bulleted list.",
        "Begin each line with a dash.",
        "Format them as bullets.",
        "Each one should be a bullet point.",
    ),
    "numbers": (
        "Use a numbered list.",
        "Number them from 1.",
        "Write them as a numbered list.",
        "Put a number before each.",
        "They should be numbered, one after the other.",
    ),
    "lines": (
        "Write one per line.",
        "Put each on its own line.",
        "One on each line, without bullets or numbers.",
        "Use a new line for each.",
        "Every item gets a line to itself, with nothing before it.",
    ),
    "json": (
        "Answer with a JSON list of strings.",
        "Use a JSON array.",
        "Format your answer as a JSON list.",
        "Return them as a JSON array of strings.",
        "I will parse your answer as a JSON list.",
    ),
    "capitals": (
        "Use capital letters only.",
        "Write it in all capitals.",
        "Write everything in upper case.",
        "All letters must be capital letters.",
        "No lower-case letters, please.",
    ),
    "exclamation": (
        "End it with an exclamation mark.",
        "The last character must be an exclamation mark.",
        "Finish with an exclamation mark.",
        "It must end with '!'.",
        "Let an exclamation mark close it.",
    ),
    "quotes": (
        "Put it in double quotes.",
        "Write it between double quotation marks.",
        "Wrap it in double quotes.",
        "Enclose the sentence in double quotes.",
        "Double quotation marks should stand around it.",
    ),
}
LANGUAGE = (
    "Write them in {language}.",
    "Answer in {language}.",
    "Use {language} words.",
    "Give the {language} names.",
    "The words should be {language} ones.",
)
WORDS = (
    "Use exactly {n} words.",
    "It must have {n} words.",
    "Write exactly {n} words.",
    "The sentence must be {n} words long.",
    "Its length should be {n} words, no more and no fewer.",
)
INCLUDE = (
    "Include the word '{word}'.",
    "Use the word '{word}'.",
    "The word '{word}' must appear.",
    "It must contain '{word}'.",
    "Make sure that '{word}' is mentioned.",
)
EXCLUDE = (
    "Do not use the word '{word}'.",
    "Leave out '{word}'.",
    "Avoid the word '{word}'.",
    "The word '{word}' must not appear.",
    "Anything but '{word}' is fine.",
)
HELD_OUT = len(LIST) - 1


def new_prompt(index: int, split: str, seed: int, mix: Mapping[str, float] = MIX) -> dict[str, Any]:
    """Prompt `index` of an endless row of them: it depends on these arguments alone.

    Lists and sentences take turns. Language is of lists, and a sentence without it sets another constraint instead.

    Args:
        index: From 0.
        split: One of [`SPLITS`]. The words that a prompt is about, taken together, are of the training split or of the
            test splits alone, and `"test_templates"` has wordings of its own.
        seed: Of all randomness.
        mix: How often each of [`CONSTRAINTS`] is set, in [0, 1]; at least one always is.
    """
    draw = random.Random(f"otpo constraints, {split}, {seed}, {index}")
    task = ("list", "sentence")[index % 2]
    able = CONSTRAINTS if task == "list" else tuple(name for name in CONSTRAINTS if name != "language")
    asked = [name for name in able if draw.random() < mix.get(name, 0.0)]
    if not asked:
        likely = [name for name in able if mix.get(name, 0.0)] or ["count"]
        asked = [draw.choice(likely)]
    say = _Wording(draw, split)
    while True:
        made = (_list if task == "list" else _sentence)(draw, asked, say)
        subject, text, constraints, answer = made
        if (sum(subject.encode()) % _TEST_SHARE == 0) == (split != "train"):
            break
    return {
        "prompt": [{"role": "user", "content": text}],
        "completion": [{"role": "assistant", "content": answer}],
        "kind": task,
        "template_id": f"{task}-{say.used[0]}",
        "constraints": {"task": task, **constraints},
    }


class _Wording:
    """Draws wordings: the held-out ones for their split, any other for the rest."""

    def __init__(self, draw: random.Random, split: str) -> None:
        self.draw, self.split = draw, split
        self.used: list[int] = []

    def __call__(self, wordings: tuple[str, ...], **values: str) -> str:
        number = HELD_OUT if self.split == "test_templates" else self.draw.randrange(HELD_OUT)
        self.used.append(number)
        return wordings[number].format(**values)


def _list(draw: random.Random, asked: list[str], say: _Wording) -> tuple[str, str, dict[str, Any], str]:
    say.used.clear()
    group = draw.choice(GROUPS)
    language = draw.choice(LANGUAGES[1:]) if "language" in asked else ""
    words = ITEMS[group][language or "en"]
    count = draw.choice(_ITEMS) if "count" in asked else 0
    size = count or draw.choice(_ITEMS)
    form = draw.choice(("commas", "bullets", "numbers", "lines", "json")) if "format" in asked else "text"
    word = draw.choice(words) if "keyword" in asked else ""
    wanted = bool(word) and draw.random() < 0.5
    answer = draw.sample([other for other in words if other != word], size - wanted) + [word] * wanted
    draw.shuffle(answer)

    number = f"{_NUMBERS[count]} " if count else ("some " if draw.random() < 0.5 else "")
    parts = [say(LIST, n=number, group=group)]
    clauses = []
    if form != "text":
        clauses.append(say(FORMATS[form]))
    if language:
        clauses.append(say(LANGUAGE, language=LANGUAGE_NAMES[language]))
    if word:
        clauses.append(say(INCLUDE if wanted else EXCLUDE, word=word))
    draw.shuffle(clauses)
    constraints = {
        "count": count,
        "format": form,
        "language": language,
        "include": [word] * wanted,
        "exclude": [word] * (bool(word) and not wanted),
    }
    return f"{group} {language} {count} {word}", " ".join(parts + clauses), constraints, _written(answer, form)


def _sentence(draw: random.Random, asked: list[str], say: _Wording) -> tuple[str, str, dict[str, Any], str]:
    say.used.clear()
    subject = draw.choice(SUBJECTS)
    count = draw.choice(_LENGTHS) if "count" in asked else 0
    form = draw.choice(("capitals", "exclamation", "quotes")) if "format" in asked else "text"
    include: list[str] = draw.sample(KEYWORDS, draw.choice((1, 2))) if "keyword" in asked else []

    clauses = []
    if count:
        clauses.append(say(WORDS, n=_NUMBERS[count]))
    if form != "text":
        clauses.append(say(FORMATS[form]))
    clauses += [say(INCLUDE, word=word) for word in include]
    draw.shuffle(clauses)
    answer = _compose(draw, subject, count or draw.choice(_LENGTHS), include)
    answer = {
        "capitals": f"{answer}.".upper(),
        "exclamation": f"{answer}!",
        "quotes": f'"{answer}."',
        "text": f"{answer}.",
    }[form]
    constraints = {"count": count, "format": form, "language": "", "include": include, "exclude": []}
    text = " ".join([say(SENTENCE, subject=subject), *clauses])
    return f"{subject} {count} {' '.join(include)}", text, constraints, answer


def _compose(draw: random.Random, subject: str, words: int, include: list[str]) -> str:
    """A sentence of so many words, at least 6, with all that it should include, at most two."""
    objects = list(include) or [draw.choice(KEYWORDS)]
    sentence = ["the", subject, draw.choice(VERBS), "the", objects[0]]
    if len(objects) > 1:
        # Eight words; shorter ones put both after one verb.
        sentence += ["and", "the", objects[1]] if words >= 8 else [objects[1]]
    room = words - len(sentence)
    for adverb in draw.sample(ADVERBS, min(room, 2)):
        sentence.append(adverb)
        room -= 1
    for adjective in draw.sample(ADJECTIVES, room):
        sentence.insert(1, adjective)
    return " ".join(sentence).capitalize()


def _written(items: list[str], form: str) -> str:
    if form == "json":
        return json.dumps(items, ensure_ascii=False)
    if form == "bullets":
        return "\n".join(f"- {item}" for item in items)
    if form == "numbers":
        return "\n".join(f"{place}. {item}" for place, item in enumerate(items, start=1))
    return ("\n" if form == "lines" else ", ").join(items)
