"""The bundled preference pairs of a shopping assistant in seven languages."""

import gzip
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from .ecommerce.lexicon import LANGUAGES
from .ecommerce.pairs import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

_FILE = "ecommerce_preferences.jsonl.gz"
_SPLITS = ("train", "test", "test_templates")


def load_demo_preferences(
    split: str = "train", languages: Sequence[str] | None = None, kinds: Sequence[str] | None = None
) -> "Dataset":
    """Loads bundled pairs whose rejected answers are wrong in a known span. All of it is generated text.

    Args:
        split: `"train"` (1,512 pairs), `"test"` (252, products that are not in train) or `"test_templates"` (252,
            products and wordings that are not in train).
        languages: One or more of en, id, th, vi, ms, fil, pt; None for all.
        kinds: What is wrong with the rejected answers, one or more of attribute, price, language, format; None
            for all.

    Returns:
        Rows in TRL's conversational format (`prompt`, `chosen`, `rejected`), with `chosen_spans` and
        `rejected_spans` (`[start, end)` in characters of the answer: what is right, and what is wrong),
        `language`, `kind`, `length` (short, medium, long), `product_id`, `template_id`, and `answer`, what a right
        answer holds: `attribute` and its `value`, `price`, `language`, `format` (text, bullets, lines, commas,
        json) and its number of `items`. Chosen and rejected answers are as long as each other on average.

    Raises:
        ValueError: An argument names something that is not there, or nothing.
    """
    from datasets import Dataset

    languages = LANGUAGES if languages is None else languages
    kinds = KINDS if kinds is None else kinds
    for name, given, allowed in (
        ("split", [split], _SPLITS),
        ("languages", languages, LANGUAGES),
        ("kinds", kinds, KINDS),
    ):
        unknown = [value for value in given if value not in allowed]
        if unknown or not given:
            raise ValueError(f"`{name}` must be among {list(allowed)}, got {unknown}.")
    lines = gzip.decompress(files("otpo.data").joinpath(_FILE).read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [r for r in rows if r.pop("split") == split and r["language"] in languages and r["kind"] in kinds]
    return Dataset.from_list(kept)
