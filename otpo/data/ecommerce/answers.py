"""Whether a model's free answer to a bundled prompt is right: its attribute, price, language and format."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from . import formats
from .lexicon import LANGUAGES, lexicon


def check_answer(row: Mapping[str, Any], answer: str) -> dict[str, bool]:
    """Checks an answer to a row's prompt against what is known of the product.

    Args:
        row: A row of [`otpo.data.load_demo_preferences`] or [`otpo.data.load_demo_instructions`].
        answer: What a model wrote.

    Returns:
        `attribute`: the asked value stands in it and no other value of that attribute, in the row's language.
        `price`: the product's price stands in it, spaces aside, and no other price in any currency of the set or
        in dollars. Each is true where it was not asked for.
        `language`: it is written in the row's language (ties between close languages count as right).
        `format`: it has the asked format. `all`: all of these.
    """
    known = row["answer"]
    results = {
        "attribute": not known["attribute"] or _has_only_value(answer, known),
        "price": not known["price"] or _prices(answer) == _prices(known["price"]),
        "language": known["language"] in likely_languages(answer),
        "format": known["format"] == "text" or formats.recognise(answer, known["items"]) == known["format"],
    }
    return {**results, "all": all(results.values())}


def likely_languages(text: str) -> set[str]:
    """The languages of the bundled set whose words the text has most of; empty if it has none."""
    counts = {code: sum(1 for word in _words(text) if word in _vocabulary(code)) for code in LANGUAGES}
    if re.search(r"[\u0e00-\u0e7f]", text):
        letters = [character for character in text if character.isalpha()]
        thai = sum("\u0e00" <= character <= "\u0e7f" for character in letters)
        counts["th"] = max(counts.values()) + 1 if thai > len(letters) / 3 else 0
    most = max(counts.values())
    return {code for code, count in counts.items() if count == most} if most else set()


def _has_only_value(answer: str, known: Mapping[str, Any]) -> bool:
    words = lexicon(known["language"])
    values = words.values[known["attribute"]]
    # A language may be called after a country, which is a value.
    text = answer.lower().replace(words.language.lower(), "\0")
    # Longest first, so that a value which is part of another one is not found inside it.
    found = set()
    for value in sorted(values, key=len, reverse=True):
        pattern = re.escape(value.lower())
        if known["language"] != "th":
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text, count = re.subn(pattern, "\0", text)
        if count:
            found.add(value)
    return found == {known["value"]}


def _prices(text: str) -> set[str]:
    """All amounts of money in a text, without spaces."""
    return {re.sub(r"\s", "", match.group()) for match in _price_pattern().finditer(text)}


@cache
def _price_pattern() -> re.Pattern[str]:
    number = r"\d(?:[\d.,]*\d)?"
    forms = [r"[A-Z]{0,2}\$\s*" + number]
    for code in LANGUAGES:
        before, after = (re.escape(sign.strip()) for sign in lexicon(code).currency["pattern"].split("{}"))
        forms.append(rf"{before}\s*{number}" if before else rf"{number}\s*{after}")
    # Not \b: Thai letters may stand right beside an amount.
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(forms)})(?![A-Za-z0-9])")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


@cache
def _vocabulary(code: str) -> set[str]:
    words = lexicon(code)
    texts = [*words.fillers, *words.labels.values(), *words.nouns]
    texts += [template for group in (words.answers, words.questions) for part in group.values() for template in part]
    texts += [value for values in words.values.values() for value in values]
    return {word for text in texts for word in _words(re.sub(r"{\w+}", " ", text))}
