import json

import pytest

from otpo.data.ecommerce.answers import check_answer, likely_languages
from otpo.data.ecommerce.lexicon import LANGUAGES, lexicon


def asked(code: str, **answer) -> dict:
    known = {"attribute": "", "value": "", "price": "", "language": code, "format": "text", "items": 0}
    return {"answer": {**known, **answer}}


@pytest.fixture(params=LANGUAGES)
def priced(request):
    """A row that asks for a price, the price, another one, and a sentence to write prices into."""
    words = lexicon(request.param)
    right, other = words.price(47000), words.price(58000)
    return asked(request.param, price=right), right, other, words.answers["price"][0]


def test_the_price_may_be_spaced_otherwise(priced):
    row, right, _, sentence = priced
    digits = right.strip("".join(c for c in right if not c.isdigit()))
    for space in ("", " ", "\u00a0"):
        tight = right.replace(" ", "")
        written = tight.replace(digits, space + digits if tight.endswith(digits) else digits + space)
        assert check_answer(row, sentence.format(name="Oruma A1000", value=written))["all"], written


def test_another_price_is_seen_in_any_currency(priced):
    row, right, other, sentence = priced
    said = sentence.format(name="Oruma A1000", value=right)
    assert check_answer(row, f"{said} {right}")["price"]
    assert not check_answer(row, sentence.format(name="Oruma A1000", value=other))["price"]
    for wrong in (other, other.replace(" ", ""), "$3", "US$ 3.50", "RM3.00", "Rp 3.000", "R$3,50"):
        assert not check_answer(row, f"{said} {wrong}")["price"], wrong


def test_a_number_that_goes_on_is_another_price(priced):
    row, right, _, _ = priced
    assert check_answer(row, right)["price"]
    for wrong in (f"1{right}", f"{right}0", f"X{right}", "47000", ""):
        assert not check_answer(row, wrong)["price"], wrong


def test_thai_letters_may_stand_beside_a_price():
    letter = lexicon("th").label("price")
    assert check_answer(asked("th", price="\u0e3f1,290"), f"{letter}\u0e3f1,290{letter}")["price"]


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("attribute", ["colour", "material", "origin"])
def test_every_value_is_told_from_every_other(code, attribute):
    words = lexicon(code)
    for value in words.values[attribute]:
        row = asked(code, attribute=attribute, value=value)
        for said in words.values[attribute]:
            for sentence in words.answers["attribute"]:
                text = sentence.format(label=words.label(attribute), name="Oruma A1000", value=said)
                results = check_answer(row, text)
                assert results["attribute"] == (said == value), text
                assert results["language"], text


@pytest.mark.parametrize("code", LANGUAGES)
def test_what_sellers_say_besides_names_no_value_and_no_price(code):
    words = lexicon(code)
    talk = " ".join([*words.fillers, *words.questions["language"]])
    for attribute, values in words.values.items():
        assert not check_answer(asked(code, attribute=attribute, value=values[0]), talk)["attribute"]
        assert check_answer(asked(code, attribute=attribute, value=values[0]), f"{talk} {values[0]}")["attribute"]
    assert check_answer(asked(code), talk)["language"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "It is made of steel and was shipped from Japan."),
        ("id", "Warnanya merah ya Kak, bahannya katun."),
        ("ms", "Warnanya merah, diperbuat daripada kapas."),
        ("fil", "Kulay pula po iyan."),
        ("pt", "O produto foi feito de couro."),
        ("vi", "S\u1ea3n ph\u1ea9m n\u00e0y l\u00e0m b\u1eb1ng th\u00e9p."),
        ("th", "\u0e2a\u0e35\u0e41\u0e14\u0e07\u0e04\u0e48\u0e30"),
    ],
)
def test_sentences_of_other_wordings_are_recognised(code, text):
    assert likely_languages(text) == {code}
    assert [other for other in LANGUAGES if check_answer(asked(other), text)["language"]] == [code]


def test_a_json_answer_may_be_laid_out_and_ordered_freely_but_holds_nothing_else():
    facts = {"Colour": "red", "Price": "S$ 29.90"}
    row = asked("en", price="S$ 29.90", format="json", items=2)
    for text in (json.dumps(facts, indent=2), json.dumps(dict(reversed(facts.items())))):
        assert check_answer(row, text)["all"]
    fewer, longer = json.dumps({"Price": "S$ 29.90"}), json.dumps({**facts, "Size": "10 x 20 cm"})
    for text in (fewer, longer, f"[{json.dumps(facts)}]", f"Here: {json.dumps(facts)}", json.dumps(facts)[:-1]):
        results = check_answer(row, text)
        assert not results["format"] and not results["all"], text


def test_nothing_is_right_about_an_empty_answer():
    row = asked("en", attribute="colour", value="red", price="S$ 29.90", format="json", items=2)
    assert not any(check_answer(row, "").values())
