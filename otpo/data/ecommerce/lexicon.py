"""The words of each language: what a shop's listing, a buyer's question and a seller's answer are made of."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

LANGUAGES = ("en", "id", "th", "vi", "ms", "fil", "pt")
WORD_ATTRIBUTES = ("colour", "material", "origin")
"""Attributes whose values are words; entry `i` of a list means the same in every language."""


@dataclass(frozen=True)
class Lexicon:
    """One language's file of `lexicon/`, field by field."""

    code: str
    language: str
    currency: dict[str, Any]
    labels: dict[str, str]
    values: dict[str, list[str]]
    nouns: list[str]
    questions: dict[str, list[str]]
    formats: dict[str, str]
    answers: dict[str, list[str]]
    fillers: list[str]

    def label(self, attribute: str) -> str:
        """The attribute's name as it stands inside a sentence."""
        return self.labels[attribute].lower()

    def price(self, amount: float) -> str:
        """An amount of money as shops of the language's country write it."""
        text = f"{amount:,.2f}" if self.currency["decimals"] else f"{amount:,.0f}"
        marks = {",": self.currency["thousands"], ".": self.currency["decimal"]}
        return self.currency["pattern"].format("".join(marks.get(sign, sign) for sign in text))


@cache
def lexicon(code: str) -> Lexicon:
    """The lexicon of a language of [`LANGUAGES`]."""
    text = files("otpo.data.ecommerce").joinpath("lexicon", f"{code}.yaml").read_text(encoding="utf-8")
    return Lexicon(code, **yaml.safe_load(text))
