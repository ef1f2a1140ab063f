"""Instructions of any number about new products, of the kinds and in the wordings of the bundled training pairs."""

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from .bundled import draw_new_product
from .lexicon import lexicon
from .make_pairs import HELD_OUT_TEMPLATE, KINDS, LENGTHS, make_instruction


def new_instruction(index: int, languages: Sequence[str], seed: int) -> dict[str, Any]:
    """Instruction `index` of an endless row of them, as `messages` with the facts of a right answer.

    Languages, kinds and lengths take turns, then wordings and formats do. Its product is in no bundled pair, its
    wording is not held out.
    """
    cells = list(product(languages, KINDS, LENGTHS))
    turn, cell = divmod(index, len(cells))
    code, kind, length = cells[cell]
    draw = random.Random(f"otpo e-commerce instructions, {seed}, {index}")
    made = draw_new_product(draw, lexicon(code))
    return make_instruction(code, kind, length, turn % HELD_OUT_TEMPLATE, made, turn, draw)
