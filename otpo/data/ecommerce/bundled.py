"""The file of bundled pairs, and products that are in none of them."""

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from .lexicon import Lexicon
from .products import Product, draw_product

BUNDLED = Path(__file__).parents[1] / "ecommerce_preferences.jsonl.gz"
_NUMBERS = 2250  # of products whose names have four digits, as those of the bundled pairs have
_HELD_OUT_EVERY = 10


def read_rows() -> list[dict[str, Any]]:
    """All bundled pairs, with their `split`."""
    return [json.loads(line) for line in gzip.decompress(BUNDLED.read_bytes()).decode().splitlines()]


@cache
def _names() -> frozenset[str]:
    return frozenset(row["product_id"] for row in read_rows())


def draw_new_product(draw: random.Random, words: Lexicon, held_out: bool = False) -> Product:
    """A random product that is in no bundled pair.

    Args:
        draw: Source of all randomness.
        words: Of the shop's language.
        held_out: Whether it is one of those that are kept for testing: their numbers are never drawn otherwise.
    """
    while True:
        number = draw.randrange(_NUMBERS // _HELD_OUT_EVERY) * _HELD_OUT_EVERY
        product = draw_product(draw, words, number if held_out else number + draw.randrange(1, _HELD_OUT_EVERY))
        if product.name not in _names():
            return product
