"""Prompts with constraints: their reference answers are right, splits are apart, and the checks by hand."""

from collections import Counter

import pytest
from trl.data_utils import is_conversational

from otpo.data import load_demo_constraints
from otpo.data.constraints import prompts
from otpo.data.constraints.checks import (
    CONSTRAINTS,
    asked_constraints,
    check_constraints,
    items_languages,
    read_items,
    score_constraints,
)
from otpo.data.constraints.words import GROUPS, ITEMS, KEYWORDS, LANGUAGES, SUBJECTS
from otpo.pairs.judges import checkers

COUNT = 400


@pytest.fixture(scope="module")
def rows():
    return {split: list(load_demo_constraints(split, COUNT)) for split in prompts.SPLITS}


def text(row) -> str:
    return row["prompt"][0]["content"]


def test_reference_answers_keep_their_constraints(rows):
    for split in rows.values():
        for row in split:
            answer = row["completion"][0]["content"]
            assert is_conversational(row) and check_constraints(row, answer)["all"], (text(row), answer)
            assert 1 <= len(asked_constraints(row)) <= 4 and checkers(row["prompt"], [answer], row) == [1.0]


def test_what_is_asked_varies(rows):
    assert Counter(row["kind"] for row in rows["train"]) == {"list": COUNT // 2, "sentence": COUNT // 2}
    assert {len(asked_constraints(row)) for row in rows["train"]} == {1, 2, 3, 4}
    assert {row["constraints"]["language"] for row in rows["train"]} == {"", *LANGUAGES[1:]}
    assert len({text(row) for row in rows["train"]}) > 0.97 * COUNT


def test_splits_are_apart(rows):
    texts = {split: {text(row) for row in own} for split, own in rows.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["test_templates"]
    held_out = {f"{kind}-{prompts.HELD_OUT}" for kind in ("list", "sentence")}
    ids = {split: {row["template_id"] for row in own} for split, own in rows.items()}
    assert ids["test_templates"] == held_out and not ids["train"] & held_out and not ids["test"] & held_out
    # No clause of a held-out wording is in the other splits.
    for wordings in (*prompts.FORMATS.values(), prompts.WORDS, prompts.INCLUDE, prompts.EXCLUDE, prompts.LANGUAGE):
        last = wordings[prompts.HELD_OUT].split("{")[0]
        assert len(wordings) == prompts.HELD_OUT + 1 and not any(last in seen for seen in texts["train"])
        assert any(last in seen for seen in texts["test_templates"])


def test_rows_depend_on_seed_and_place_alone(rows):
    assert list(load_demo_constraints("train", 7)) == rows["train"][:7]
    assert list(load_demo_constraints("train", 7, 1)) != rows["train"][:7]


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("split", prompts.SPLITS)
def test_one_constraint_alone(name, split):
    rows = load_demo_constraints(split, 40, mix={name: 1.0})
    asked = Counter(asked_constraints(row) for row in rows)
    # A sentence is in no language but English, so it is asked for a number of words instead.
    want = {(name,): 40} if name != "language" else {("language",): 20, ("count",): 20}
    assert asked == want


def test_more_constraints_are_asked_of_a_fuller_mix():
    full = load_demo_constraints("train", 50, mix=dict.fromkeys(CONSTRAINTS, 1.0))
    assert all(len(asked_constraints(row)) == (4 if row["kind"] == "list" else 3) for row in full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "`split` must be among"),
        ({"count": 0}, "`count` must be at least 1, got 0"),
        ({"mix": {"length": 1}}, "`mix` must be among"),
        ({"mix": {"count": 1.5}}, r"within \[0, 1\] and not all 0"),
        ({"mix": {"count": 0}}, r"within \[0, 1\] and not all 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        load_demo_constraints(**options)


@pytest.mark.parametrize(
    ("text", "form", "items"),
    [
        ("dog, cat, cow", "commas", ["dog", "cat", "cow"]),
        ("dog, cat.", "commas", ["dog", "cat"]),
        ("dog", "commas", ["dog"]),
        ("- dog\n- cat", "bullets", ["dog", "cat"]),
        ("* dog\n\n• cat\n", "bullets", ["dog", "cat"]),
        ("1. dog\n2) cat", "numbers", ["dog", "cat"]),
        ("1. dog\n3. cat", "", ["dog", "cat"]),
        ("dog\ncat", "lines", ["dog", "cat"]),
        ("Here are two:\n- dog\n- cat", "", ["Here are two:", "- dog", "- cat"]),
        ('["dog", "cat"]', "json", ["dog", "cat"]),
        ('["dog", 2]', "", []),
        ('["dog"', "", []),
        ("[1, 2]", "", []),
    ],
)
def test_lists_are_read(text, form, items):
    assert read_items(text) == (form, items)


def listed(**asked):
    return {
        "constraints": {
            "task": "list",
            "count": 0,
            "format": "text",
            "language": "",
            "include": [],
            "exclude": [],
            **asked,
        }
    }


@pytest.mark.parametrize(
    ("asked", "answer", "wrong"),
    [
        ({"count": 2}, "dog, cat", set()),
        ({"count": 2}, "dog, dog", {"count"}),
        ({"count": 2}, "dog, Dog.", {"count"}),
        ({"count": 2}, "dog,", {"count"}),
        ({"count": 1}, "I can think of a great many animals", {"count"}),
        ({"format": "bullets"}, "dog, cat", {"format"}),
        ({"language": "es"}, "perro, gato", set()),
        ({"language": "pt"}, "gato, vaca", set()),
        ({"language": "es"}, "dog, cat", {"language"}),
        ({"language": "es"}, "perro, xx, yy", {"language"}),
        ({"include": ["cat"]}, "dog, Cat", set()),
        ({"include": ["cat"]}, "dog, caterpillar", {"keyword"}),
        ({"exclude": ["cat"]}, "dog, cat", {"keyword"}),
        ({"count": 3, "include": ["cow"]}, "dog, cat", {"count", "keyword"}),
        ({"count": 2}, "  \n", set(CONSTRAINTS)),
        ({}, "", set(CONSTRAINTS)),
    ],
)
def test_lists_are_checked(asked, answer, wrong):
    row = listed(**asked)
    got = check_constraints(row, answer)
    assert {name for name in CONSTRAINTS if not got[name]} == wrong and got["all"] == (not wrong)
    told = asked_constraints(row)
    if told:
        assert score_constraints(row, answer) == (len(told) - len(wrong & set(told))) / len(told)


@pytest.mark.parametrize(
    ("asked", "answer", "wrong"),
    [
        ({"count": 3}, "The king sings.", set()),
        ({"count": 4}, "The king's well-known song.", set()),
        ({"count": 3}, "The king sings loudly.", {"count"}),
        ({"format": "capitals"}, "THE KING SINGS.", set()),
        ({"format": "capitals"}, "The king sings.", {"format"}),
        ({"format": "capitals"}, "123", {"format"}),
        ({"format": "exclamation"}, "The king sings!\n", set()),
        ({"format": "exclamation"}, "The king! He sings.", {"format"}),
        ({"format": "quotes"}, '"The king sings."', set()),
        ({"format": "quotes"}, '"', {"format"}),
        ({"format": "quotes"}, 'He said "no"', {"format"}),
        ({"include": ["river", "train"]}, "The RIVER train.", set()),
        ({"include": ["river", "train"]}, "The river.", {"keyword"}),
    ],
)
def test_sentences_are_checked(asked, answer, wrong):
    got = check_constraints(listed(task="sentence", **asked), answer)
    assert {name for name in CONSTRAINTS if not got[name]} == wrong


def test_languages_of_items():
    assert items_languages(["rosa"]) == {"es", "de", "it", "pt"}
    assert items_languages([]) == items_languages(["xyz"]) == set()


def test_words_are_enough_and_distinct():
    for group in GROUPS:
        for code in LANGUAGES:
            words = ITEMS[group][code]
            assert len(words) == len({word.casefold() for word in words}) >= 11, (group, code)
    assert not set(KEYWORDS) & set(SUBJECTS) and len(set(KEYWORDS)) == len(KEYWORDS)
