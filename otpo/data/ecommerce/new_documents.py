"""Documents for pretraining, of the words, facts and formats that the instructions are about, and in no chat form.

Products are in no bundled pair, those of the test split in no document of the training split. The wordings that
`test_templates` holds out do not occur.
"""

import random
from collections.abc import Callable, Sequence

from . import formats
from .bundled import draw_new_product
from .lexicon import WORD_ATTRIBUTES, Lexicon, lexicon
from .make_pairs import HELD_OUT_TEMPLATE
from .products import ATTRIBUTES, Product

SPLITS = ("train", "test")
# Out of 12 documents. Most take facts from a page that they hold, since reading a page is what is to be learnt.
_SHARES = {"listings": 1, "prose": 2, "questions": 4, "lists": 1, "conversions": 4}
_TOLD = (*WORD_ATTRIBUTES, "price")  # what the sentences of each language are made for


def make_document(index: int, split: str, languages: Sequence[str], seed: int) -> dict[str, str]:
    """Document `index` of an endless row of them.

    Returns:
        `text`, its `language`, and its `kind`: listings, prose, questions, lists or conversions.
    """
    draw = random.Random(f"otpo e-commerce documents, {split}, {seed}, {index}")
    words = lexicon(draw.choice(languages))
    kind = draw.choices(list(_SHARES), list(_SHARES.values()))[0]
    count = draw.randint(1, 2) if kind in ("listings", "lists") else 1
    products = [draw_new_product(draw, words, held_out=split == "test") for _ in range(count)]
    text = "\n\n".join(_WRITERS[kind](words, product, draw) for product in products)
    return {"text": text, "language": words.code, "kind": kind}


def _listing(words: Lexicon, product: Product, draw: random.Random) -> str:
    return product.listing(words)


def _prose(words: Lexicon, product: Product, draw: random.Random) -> str:
    """A page and its description, or the description alone."""
    sentences = [_answer(words, product, name, draw) for name in draw.sample(_TOLD, draw.randint(2, 4))]
    sentences += draw.sample(words.fillers, draw.randint(1, 4))
    draw.shuffle(sentences)
    paragraph = " ".join(sentences)
    return f"{product.listing(words)}\n\n{paragraph}" if draw.random() < 0.75 else paragraph


def _questions(words: Lexicon, product: Product, draw: random.Random) -> str:
    """A page, and questions about it with their answers."""
    asked = draw.sample(_TOLD, draw.randint(2, 4))
    talks = [f"{_question(words, product, name, draw)}\n{_reply(words, product, name, draw)}" for name in asked]
    return "\n\n".join([product.listing(words), *talks])


def _lists(words: Lexicon, product: Product, draw: random.Random) -> str:
    """A product's name over some of its facts, in a format."""
    heading = f"{product.name} ({words.nouns[product.noun]})"
    return f"{heading}\n{formats.write(draw.choice(formats.FORMATS), _some_facts(words, product, draw))}"


def _conversions(words: Lexicon, product: Product, draw: random.Random) -> str:
    """A page, and the same facts of it in two formats or more, each asked for."""
    facts = _some_facts(words, product, draw)
    items = ", ".join(label.lower() for label in facts)
    parts = [product.listing(words)]
    for name in draw.sample(formats.FORMATS, draw.randint(2, 4)):
        wording = words.questions["format"][draw.randrange(HELD_OUT_TEMPLATE)]
        parts.append(f"{wording.format(items=items, format=words.formats[name])}\n{formats.write(name, facts)}")
    return "\n\n".join(parts)


def _some_facts(words: Lexicon, product: Product, draw: random.Random) -> dict[str, str]:
    chosen = draw.sample(ATTRIBUTES, draw.randint(2, len(ATTRIBUTES)))
    return {words.labels[name]: product.value(name, words) for name in chosen}


def _question(words: Lexicon, product: Product, attribute: str, draw: random.Random) -> str:
    wording = words.questions["price" if attribute == "price" else "attribute"][draw.randrange(HELD_OUT_TEMPLATE)]
    question = wording.format(label=words.label(attribute), noun=words.nouns[product.noun])
    if attribute in WORD_ATTRIBUTES and draw.random() < 0.3:
        question += f" {words.questions['language'][draw.randrange(HELD_OUT_TEMPLATE)]}"
    return question


def _reply(words: Lexicon, product: Product, attribute: str, draw: random.Random) -> str:
    sentences = draw.sample(words.fillers, draw.choice((0, 0, 1, 2)))
    sentences.insert(draw.randint(0, len(sentences)), _answer(words, product, attribute, draw))
    return " ".join(sentences)


def _answer(words: Lexicon, product: Product, attribute: str, draw: random.Random) -> str:
    wording = words.answers["price" if attribute == "price" else "attribute"][draw.randrange(HELD_OUT_TEMPLATE)]
    label, value = words.label(attribute), product.value(attribute, words)
    sentence = wording.format(label=label, name=product.name, value=value)
    return sentence[:1].upper() + sentence[1:]


_WRITERS: dict[str, Callable[[Lexicon, Product, random.Random], str]] = {
    "listings": _listing,
    "prose": _prose,
    "questions": _questions,
    "lists": _lists,
    "conversions": _conversions,
}
