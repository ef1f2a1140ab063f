"""Writes the bundled preference pairs: `python -m otpo.data.ecommerce.generate [--check]`.

2,016 pairs: 7 languages x 4 kinds of error x 3 lengths x 24. The same lines on every machine; how gzip packs
them is up to the zlib of that Python.
"""

import argparse
import gzip
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .bundled import BUNDLED
from .lexicon import LANGUAGES, lexicon
from .make_pairs import HELD_OUT_TEMPLATE, KINDS, LENGTHS, Balance, make_pair
from .products import draw_product

_SPLITS = ["train"] * 18 + ["test"] * 3 + ["test_templates"] * 3


def make_rows() -> list[dict[str, Any]]:
    """All pairs, in an order that mixes languages, kinds and lengths."""
    rows = []
    turns: Counter[tuple[str, str]] = Counter()
    for code in LANGUAGES:
        for kind in KINDS:
            balances = {split: Balance() for split in _SPLITS}
            draw = random.Random(f"otpo e-commerce preferences, {code}, {kind}")
            for length in LENGTHS:
                for place, split in enumerate(_SPLITS):
                    template = HELD_OUT_TEMPLATE if split == "test_templates" else place % HELD_OUT_TEMPLATE
                    turn = turns[kind, split]
                    product = draw_product(draw, lexicon(code), len(rows))
                    pair = make_pair(code, kind, length, template, product, turn, balances[split], draw)
                    turns[kind, split] += 1
                    rows.append({**pair, "split": split})
    random.Random("otpo e-commerce preferences, order").shuffle(rows)
    return rows


def to_bytes(rows: list[dict[str, Any]]) -> bytes:
    """The bundled file's content: JSON lines, gzipped without a time stamp."""
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=9) as stream:
        stream.write(text.encode())
    return buffer.getvalue()


def main() -> int:
    """Writes the file, or compares it with what the generator makes."""
    parser = argparse.ArgumentParser(description="Generate the bundled e-commerce preference pairs.")
    parser.add_argument("--output", type=Path, default=BUNDLED, help="file to write (default: the bundled one)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file differs")
    args = parser.parse_args()
    made = to_bytes(make_rows())
    if not args.check:
        args.output.write_bytes(made)
    elif gzip.decompress(args.output.read_bytes()) != gzip.decompress(made):
        print(f"{args.output} is not what the generator makes: run it without --check.", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
