"""Pairs of any number about new products, of the kinds and in the wordings of the bundled ones."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, product
from typing import Any

from .bundled import draw_new_product
from .lexicon import lexicon
from .make_pairs import HELD_OUT_TEMPLATE, LENGTHS, Balance, make_pair


def new_pairs(split: str, languages: Sequence[str], kinds: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """An endless row of pairs. Languages, kinds and lengths take turns, then wordings and formats do.

    Their products are in no bundled pair, and those of a test split in nothing that is drawn for training; only
    `"test_templates"` has the held-out wordings. In each language and kind, chosen and rejected answers are as long as
    each other on average.
    """
    balances: defaultdict[tuple[str, str], Balance] = defaultdict(Balance)
    cells = list(product(languages, kinds, LENGTHS))
    for index in count():
        turn, cell = divmod(index, len(cells))
        code, kind, length = cells[cell]
        draw = random.Random(f"otpo e-commerce preferences, {split}, {seed}, {index}")
        made = draw_new_product(draw, lexicon(code), held_out=split != "train")
        template = HELD_OUT_TEMPLATE if split == "test_templates" else turn % HELD_OUT_TEMPLATE
        yield make_pair(code, kind, length, template, made, turn, balances[code, kind], draw)
