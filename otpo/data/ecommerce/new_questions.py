"""Short questions about a short page, answered in one line: what a model of a million parameters can learn.

The page has three facts in any order, the question asks for one of them, and the answer is its label and its value.
Words and wordings are those of the other data; products are in no bundled pair. On request, sellers misread
one of the wordings and state another fact: what is fine-tuned on such answers does so too, until its own are judged.
"""

import random
from collections.abc import Sequence
from typing import Any

from . import formats
from .bundled import draw_new_product
from .lexicon import WORD_ATTRIBUTES, Lexicon, lexicon
from .make_pairs import HELD_OUT_TEMPLATE
from .products import Product

SPLITS = ("train", "test", "test_templates")
MISREAD = 1
"""The wording whose questions sellers misread, where they do."""
_ASKED_ON_A_PAGE = 3  # in a document


def new_question(index: int, split: str, languages: Sequence[str], seed: int, misread: float = 0.0) -> dict[str, Any]:
    """Question `index` of an endless row of them: `prompt`, `completion`, and the facts that a right answer holds.

    Languages and attributes take turns. Products of the test splits are in no question of the training split, and
    `"test_templates"` alone has the held-out wordings. `misread` is the share of the questions in wording
    [`MISREAD`] whose completion states another fact; nothing else depends on it.
    """
    turn, place = divmod(index, len(languages))
    words = lexicon(languages[place])
    attribute = WORD_ATTRIBUTES[turn % len(WORD_ATTRIBUTES)]
    draw = random.Random(f"otpo e-commerce questions, {split}, {seed}, {index}")
    product = draw_new_product(draw, words, held_out=split != "train")
    template = HELD_OUT_TEMPLATE if split == "test_templates" else draw.randrange(HELD_OUT_TEMPLATE)
    value = product.value(attribute, words)
    page, stated = _page(words, product, draw), attribute
    if draw.random() < misread and template == MISREAD:
        stated = WORD_ATTRIBUTES[(WORD_ATTRIBUTES.index(attribute) + 1) % len(WORD_ATTRIBUTES)]
    return {
        "prompt": [{"role": "user", "content": f"{page}\n\n{_ask(words, product, attribute, template)}"}],
        "completion": [{"role": "assistant", "content": _reply(words, product, stated)}],
        "language": words.code,
        "kind": "question",
        "length": "short",
        "product_id": product.name,
        "template_id": f"{words.code}-question-{template}",
        "answer": {
            "attribute": attribute,
            "value": value,
            "price": "",
            "language": words.code,
            "format": "text",
            "items": 0,
        },
    }


def question_document(index: int, split: str, languages: Sequence[str], seed: int) -> dict[str, str]:
    """Document `index` of an endless row of them: a short page, its facts again, and questions with their answers.

    Returns:
        `text`, its `language`, and its `kind`, which is "short questions".
    """
    words = lexicon(languages[index % len(languages)])
    draw = random.Random(f"otpo e-commerce question documents, {split}, {seed}, {index}")
    product = draw_new_product(draw, words, held_out=split != "train")
    # Facts that stand there twice teach a small model to copy, which is what answering from a page is.
    again = draw.sample(WORD_ATTRIBUTES, len(WORD_ATTRIBUTES))
    parts = [_page(words, product, draw), formats.write(draw.choice(formats.FORMATS), _facts(words, product, again))]
    for attribute in draw.sample(WORD_ATTRIBUTES, _ASKED_ON_A_PAGE):
        wording = draw.randrange(HELD_OUT_TEMPLATE)
        parts.append(f"{_ask(words, product, attribute, wording)}\n{_reply(words, product, attribute)}")
    return {"text": "\n\n".join(parts), "language": words.code, "kind": "short questions"}


def _page(words: Lexicon, product: Product, draw: random.Random) -> str:
    """The product's name and three of its facts, in a random order."""
    shown = draw.sample(WORD_ATTRIBUTES, len(WORD_ATTRIBUTES))
    return f"{product.name} ({words.nouns[product.noun]})\n{formats.write('lines', _facts(words, product, shown))}"


def _facts(words: Lexicon, product: Product, attributes: Sequence[str]) -> dict[str, str]:
    return {words.labels[name]: product.value(name, words) for name in attributes}


def _ask(words: Lexicon, product: Product, attribute: str, template: int) -> str:
    wording = words.questions["attribute"][template]
    return wording.format(label=words.label(attribute), noun=words.nouns[product.noun])


def _reply(words: Lexicon, product: Product, attribute: str) -> str:
    return formats.write("lines", _facts(words, product, [attribute]))
