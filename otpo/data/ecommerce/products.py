"""Products that don't exist, with every attribute a listing shows."""

import random
from dataclasses import dataclass

from .lexicon import WORD_ATTRIBUTES, Lexicon

ATTRIBUTES = (*WORD_ATTRIBUTES, "weight", "size", "price")
_BRANDS = ("Lunari", "Tovela", "Kirano", "Melisto", "Pravio", "Sundeka", "Balora", "Nivetta", "Oruma", "Zelindo")


@dataclass(frozen=True)
class Product:
    """A listing's content: `name`, index of the `noun`, and a value for each of [`ATTRIBUTES`].

    Values that are words are indices into the lexicon's list, so that any language can name them.
    """

    name: str
    noun: int
    words: dict[str, int]
    weight: str
    size: str
    price: float

    def value(self, attribute: str, words: Lexicon) -> str:
        """The attribute's value as `words`' language writes it."""
        if attribute in WORD_ATTRIBUTES:
            return words.values[attribute][self.words[attribute]]
        return words.price(self.price) if attribute == "price" else getattr(self, attribute)

    def listing(self, words: Lexicon) -> str:
        """The product's page, one line each."""
        lines = [f"{self.name} ({words.nouns[self.noun]})"]
        return "\n".join(lines + [f"{words.labels[a]}: {self.value(a, words)}" for a in ATTRIBUTES])


def draw_product(draw: random.Random, words: Lexicon, number: int) -> Product:
    """A random product for a shop of the language; other numbers give other names."""
    return Product(
        name=f"{draw.choice(_BRANDS)} {draw.choice('ABCDEFGHJKLM')}{1000 + 4 * number + draw.randrange(4)}",
        noun=draw.randrange(len(words.nouns)),
        words={attribute: draw.randrange(len(words.values[attribute])) for attribute in WORD_ATTRIBUTES},
        weight=f"{draw.randrange(10, 99) * 10} g",
        size=f"{draw.randrange(10, 60)} x {draw.randrange(10, 60)} cm",
        price=draw_price(draw, words),
    )


def draw_price(draw: random.Random, words: Lexicon, like: float | None = None) -> float:
    """A random price of the language's currency, with as many digits as `like` when that is given."""
    unit = words.currency.get("unit", 1)
    while True:
        price = draw.randrange(words.currency["low"], words.currency["high"]) * unit
        price += draw.choice((0.0, 0.5, 0.9)) if words.currency["decimals"] else 0
        if like is None or (price != like and len(words.price(price)) == len(words.price(like))):
            return price
