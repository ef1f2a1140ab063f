"""One preference pair of each kind of error, with the spans that make the difference.

Length must not tell right from wrong. Where there are several wrong answers to choose from, a pair takes the one that
brings the running balance of its language nearest to zero: how often the chosen answer is the longer one, and by
how much. Formats take turns instead: JSON is longer than all others, so a free choice would always pair it alike.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from . import formats
from .lexicon import LANGUAGES, WORD_ATTRIBUTES, Lexicon, lexicon
from .products import Product, draw_price

KINDS = ("attribute", "price", "language", "format")
LENGTHS = ("short", "medium", "long")
_FILLERS = {"short": 0, "medium": 2, "long": 5}
_ITEMS = {"short": 2, "medium": 4, "long": 6}
_ITEM_ORDER = ("colour", "price", "material", "origin", "weight", "size")
HELD_OUT_TEMPLATE = 3
# Each pair of formats, right and wrong, is followed by its reverse, so that lengths cancel within any run of pairs.
_FORMAT_TURNS = [turn for a, b in combinations(formats.FORMATS, 2) for turn in ((a, b), (b, a))]


@dataclass
class Balance:
    """How far the pairs made so far are from lengths that tell nothing."""

    longer: int = 0
    characters: int = 0

    def nearest(self, chosen: "Answer", candidates: Iterable["Answer"]) -> "Answer":
        """Takes, and counts, the wrong answer that leaves the balance nearest to zero."""

        def distance(wrong: Answer) -> tuple[int, int]:
            difference = len(chosen.text) - len(wrong.text)
            return abs(self.longer + _sign(difference)), abs(self.characters + difference)

        best = min(candidates, key=distance)
        difference = len(chosen.text) - len(best.text)
        self.longer += _sign(difference)
        self.characters += difference
        return best


@dataclass(frozen=True)
class Answer:
    """A text and the stretches of it, `[start, end)`, that are right or wrong."""

    text: str
    spans: tuple[tuple[int, int], ...]


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def make_pair(
    code: str,
    kind: str,
    length: str,
    template: int,
    product: Product,
    turn: int,
    balance: Balance,
    draw: random.Random,
) -> dict[str, Any]:
    """A pair as a row of the bundled file, without its split.

    Args:
        code: Language of the prompt and of the chosen answer.
        kind: What is wrong with the rejected answer, one of [`KINDS`].
        length: One of [`LENGTHS`].
        template: Which wording of question and answer.
        product: What is asked about.
        turn: How many pairs of this kind its split has so far, in all languages.
        balance: Of the pairs of this language and kind so far; updated.
        draw: Source of all randomness.
    """
    words = lexicon(code)
    question, chosen, wrong, answer = _MAKERS[kind](words, product, length, template, turn, draw)
    rejected = balance.nearest(chosen, wrong)
    return {
        "prompt": [_prompt(words, product, question)],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_spans": [list(span) for span in chosen.spans],
        "rejected_spans": [list(span) for span in rejected.spans],
        **_facts(code, kind, length, template, product, answer),
    }


def make_instruction(
    code: str, kind: str, length: str, template: int, product: Product, turn: int, draw: random.Random
) -> dict[str, Any]:
    """A request and its right answer as `messages`, with the facts of [`make_pair`]; its arguments too."""
    words = lexicon(code)
    question, chosen, _, answer = _MAKERS[kind](words, product, length, template, turn, draw)
    return {
        "messages": [_prompt(words, product, question), {"role": "assistant", "content": chosen.text}],
        **_facts(code, kind, length, template, product, answer),
    }


def _prompt(words: Lexicon, product: Product, question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{product.listing(words)}\n\n{question}"}


def _facts(
    code: str, kind: str, length: str, template: int, product: Product, answer: dict[str, Any]
) -> dict[str, Any]:
    return {
        "language": code,
        "kind": kind,
        "length": length,
        "product_id": product.name,
        "template_id": f"{code}-{kind}-{template}",
        "answer": {
            "attribute": "",
            "value": "",
            "price": "",
            "language": code,
            "format": "text",
            "items": 0,
            **answer,
        },
    }


def _sentences(
    words: Lexicon, template: str, slots: dict[str, str], value: str, fillers: list[str], at: int
) -> Answer:
    """Fillers with the answering sentence at place `at`, and where the value stands."""
    head, tail = template.format(**slots, value="\0").split("\0")
    head = head[:1].upper() + head[1:]
    before = " ".join(fillers[:at])
    start = len(before) + (1 if before else 0) + len(head)
    text = " ".join(part for part in (before, head + value + tail, " ".join(fillers[at:])) if part)
    return Answer(text, ((start, start + len(value)),))


def _layout(words: Lexicon, length: str, draw: random.Random, more: int = 0) -> tuple[list[str], int]:
    fillers = draw.sample(words.fillers, max(0, _FILLERS[length] + more))
    return fillers, draw.randrange(len(fillers) + 1)


def _attribute(words: Lexicon, product: Product, length: str, template: int, turn: int, draw: random.Random):
    attribute = draw.choice(WORD_ATTRIBUTES)
    slots = {"label": words.label(attribute), "name": product.name}
    fillers, at = _layout(words, length, draw)
    right = product.value(attribute, words)
    others = [value for value in words.values[attribute] if value != right]
    draw.shuffle(others)
    sentence = words.answers["attribute"][template]
    chosen = _sentences(words, sentence, slots, right, fillers, at)
    wrong = [_sentences(words, sentence, slots, value, fillers, at) for value in others]
    question = words.questions["attribute"][template].format(label=slots["label"], noun=words.nouns[product.noun])
    return question, chosen, wrong, {"attribute": attribute, "value": right}


def _price(words: Lexicon, product: Product, length: str, template: int, turn: int, draw: random.Random):
    slots = {"name": product.name}
    fillers, at = _layout(words, length, draw)
    right = words.price(product.price)
    sentence = words.answers["price"][template]
    chosen = _sentences(words, sentence, slots, right, fillers, at)
    other = words.price(draw_price(draw, words, like=product.price))
    wrong = [_sentences(words, sentence, slots, other, fillers, at)]
    question = words.questions["price"][template].format(noun=words.nouns[product.noun])
    return question, chosen, wrong, {"price": right}


def _language(words: Lexicon, product: Product, length: str, template: int, turn: int, draw: random.Random):
    attribute = draw.choice(WORD_ATTRIBUTES)
    ask = words.questions["attribute"][template].format(label=words.label(attribute), noun=words.nouns[product.noun])
    fillers, at = _layout(words, length, draw)
    right = product.value(attribute, words)
    slots = {"label": words.label(attribute), "name": product.name}
    chosen = _sentences(words, words.answers["attribute"][template], slots, right, fillers, at)
    wrong = []
    for code in draw.sample([code for code in LANGUAGES if code != words.code], 6):
        other = lexicon(code)
        foreign = {"label": other.label(attribute), "name": product.name}
        sentences = other.answers["attribute"]
        for sentence in (
            sentences[:HELD_OUT_TEMPLATE] if template < HELD_OUT_TEMPLATE else sentences[HELD_OUT_TEMPLATE:]
        ):
            for more in (0, 0, 0, 0, -1, 1) if _FILLERS[length] else (0,):
                padding, place = _layout(other, length, draw, more)
                wrong.append(_sentences(other, sentence, foreign, product.value(attribute, other), padding, place))
    wrong = [Answer(answer.text, ((0, len(answer.text)),)) for answer in wrong]
    chosen = Answer(chosen.text, ((0, len(chosen.text)),))
    return f"{ask} {words.questions['language'][template]}", chosen, wrong, {"attribute": attribute, "value": right}


def _format(words: Lexicon, product: Product, length: str, template: int, turn: int, draw: random.Random):
    items = _ITEM_ORDER[: _ITEMS[length]]
    facts = {words.labels[item]: product.value(item, words) for item in items}
    # One further in each round: wordings take turns too, and 12 is a multiple of their number.
    asked, given = _FORMAT_TURNS[(turn + turn // len(_FORMAT_TURNS)) % len(_FORMAT_TURNS)]
    chosen, wrong = (
        Answer(text, ((0, len(text)),)) for text in (formats.write(asked, facts), formats.write(given, facts))
    )
    question = words.questions["format"][template].format(
        items=", ".join(words.label(item) for item in items), format=words.formats[asked]
    )
    answer = {"price": words.price(product.price), "format": asked, "items": len(items)}
    return question, chosen, [wrong], answer


_Maker = Callable[[Lexicon, Product, str, int, int, random.Random], tuple[str, Answer, list[Answer], dict[str, Any]]]
_MAKERS: dict[str, _Maker] = {"attribute": _attribute, "price": _price, "language": _language, "format": _format}
