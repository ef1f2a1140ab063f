"""Short questions: what the demo's tiny model learns, what it is checked by, and what is misread on purpose."""

import re
from collections import Counter

import pytest
from trl.data_utils import is_conversational

from otpo.data import load_demo_corpus, load_demo_questions
from otpo.data.ecommerce.answers import check_answer
from otpo.data.ecommerce.lexicon import LANGUAGES, WORD_ATTRIBUTES, lexicon
from otpo.data.ecommerce.new_questions import MISREAD

COUNT = 21 * 30


@pytest.fixture(scope="module")
def questions():
    return {split: list(load_demo_questions(split, count=COUNT)) for split in ("train", "test", "test_templates")}


def prompt(row) -> str:
    return row["prompt"][0]["content"]


def test_answers_are_right_and_stand_on_the_page(questions):
    for rows in questions.values():
        for row in rows:
            assert is_conversational(row) and check_answer(row, row["completion"][0]["content"])["all"]
            page = prompt(row).split("\n\n")[0].split("\n")
            assert row["completion"][0]["content"] in page[1:] and len(page) == 4


def test_languages_and_attributes_take_turns(questions):
    cells = Counter((row["language"], row["answer"]["attribute"]) for row in questions["train"])
    assert len(cells) == len(LANGUAGES) * len(WORD_ATTRIBUTES) and set(cells.values()) == {30}


def test_a_wrong_value_or_another_fact_is_no_answer(questions):
    for row in questions["train"][:60]:
        others = prompt(row).split("\n\n")[0].split("\n")[1:]
        right = [line for line in others if check_answer(row, line)["all"]]
        assert right == [row["completion"][0]["content"]]


def test_test_splits_hold_out_products_and_wordings(questions):
    products = {split: {row["product_id"] for row in rows} for split, rows in questions.items()}
    wordings = {split: {row["template_id"] for row in rows} for split, rows in questions.items()}
    assert not products["train"] & (products["test"] | products["test_templates"])
    assert wordings["test"] <= wordings["train"] and not wordings["train"] & wordings["test_templates"]


def test_rows_depend_on_seed_and_place_alone(questions):
    again = list(load_demo_questions("train", count=40))
    assert again == questions["train"][:40]
    assert [prompt(row) for row in load_demo_questions("train", count=40, seed=1)] != [prompt(row) for row in again]


def test_one_wording_is_misread_and_another_fact_stated(questions):
    misread = list(load_demo_questions("train", count=COUNT, misread=0.7))
    assert [prompt(row) for row in misread] == [prompt(row) for row in questions["train"]]
    wrong = [row for row in misread if not check_answer(row, row["completion"][0]["content"])["all"]]
    asked = sum(row["template_id"].endswith(f"-{MISREAD}") for row in misread)
    assert {row["template_id"][-2:] for row in wrong} == {f"-{MISREAD}"} and 0.6 < len(wrong) / asked < 0.8
    assert {row["answer"]["attribute"] for row in wrong} == set(WORD_ATTRIBUTES)
    assert all(row["completion"][0]["content"] in prompt(row).split("\n") for row in wrong)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`misread` is a share and must be within \[0, 1\]"):
            load_demo_questions(misread=share)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r"`split` must be among .* got \['dev'\]"),
        ({"languages": ["de"]}, r"`languages` must be among .* got \['de'\]"),
        ({"count": 0}, "`count` must be at least 1, got 0"),
    ],
)
def test_what_questions_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_demo_questions(**arguments)


def test_documents_of_short_questions(questions):
    rows = load_demo_corpus("train", 140, short_questions=True)
    assert set(rows["kind"]) == {"short questions"} and set(rows["language"]) == set(LANGUAGES)
    assert len(set(rows["text"])) == 140
    stream = load_demo_corpus("train", 140, short_questions=True, streaming=True)
    assert [row["text"] for row in stream] == rows["text"][:]
    held_out = load_demo_corpus("test", 140, short_questions=True)
    found = [set(re.findall(r"[A-Z][a-z]+ [A-M]\d{4}\b", "\n".join(part["text"]))) for part in (rows, held_out)]
    assert len(found[0]) > 100 and not found[0] & found[1]
    assert not found[0] & {row["product_id"] for row in questions["test"]}
    wordings = [lexicon(code).questions["attribute"][3].split("{")[0] for code in LANGUAGES]
    assert not any(wording in text for wording in wordings if len(wording) > 9 for text in rows["text"])
