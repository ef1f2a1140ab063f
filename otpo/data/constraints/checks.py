"""Whether an answer keeps the constraints of its prompt: number, form, language and words."""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from .words import ITEMS, LANGUAGES

CONSTRAINTS = ("count", "format", "language", "keyword")
LIST_FORMATS = ("commas", "bullets", "numbers", "lines", "json")
SENTENCE_FORMATS = ("capitals", "exclamation", "quotes")
_LONGEST_ITEM = 3  # words: a longer one is a sentence, and no item
_BULLET = re.compile(r"[-*•]\s+(.*)")
_NUMBER = re.compile(r"(\d+)[.)]\s+(.*)")


def check_constraints(row: Mapping[str, Any], answer: str) -> dict[str, bool]:
    """Checks an answer against its row's `constraints`, as [`otpo.data.load_demo_constraints`] writes them.

    Args:
        row: Has `constraints`: `task` (`"list"` or `"sentence"`), `count` (items or words, 0 for any), `format`
            (`"text"` for any), `language` (of a list's items, empty for any), `include` and `exclude` (words).
        answer: What a model wrote.

    Returns:
        Each of [`CONSTRAINTS`], true where it is kept or not asked for, and `all` of them. A list whose items can't be
        told apart, because it has none, repeats one or has a sentence for one, keeps no number. A blank answer keeps
        nothing.
    """
    asked = row["constraints"]
    text = answer.strip()
    if not text:
        return dict.fromkeys((*CONSTRAINTS, "all"), False)
    is_list = asked["task"] == "list"
    if is_list:
        form, items = read_items(text)
        count = _count_is_right(items, asked["count"])
        formed = asked["format"] in ("text", form)
    else:
        items, count = [], asked["count"] in (0, _words(text))
        formed = _is_written_as(text, asked["format"])
    results = {
        "count": count,
        "format": formed,
        "language": not asked["language"] or asked["language"] in items_languages(items),
        "keyword": all(_has(text, word) for word in asked["include"])
        and not any(_has(text, word) for word in asked["exclude"]),
    }
    return {**results, "all": all(results.values())}


def asked_constraints(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of [`CONSTRAINTS`] a row's prompt sets."""
    asked = row["constraints"]
    is_set = {
        "count": asked["count"] > 0,
        "format": asked["format"] != "text",
        "language": bool(asked["language"]),
        "keyword": bool(asked["include"] or asked["exclude"]),
    }
    return tuple(name for name in CONSTRAINTS if is_set[name])


def score_constraints(row: Mapping[str, Any], answer: str) -> float:
    """The share of the constraints that the prompt sets which the answer keeps, in [0, 1]; 1 of none is 1."""
    results = check_constraints(row, answer)
    asked = asked_constraints(row)
    return sum(results[name] for name in asked) / len(asked) if asked else float(results["all"])


def read_items(text: str) -> tuple[str, list[str]]:
    """How a list is written, one of [`LIST_FORMATS`] or `""`, and its items.

    All of the text has to be the list: a line before or after it is an item of another form. Numbers count from 1.
    """
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    if text.strip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError:
            return "", []
        return ("json", items) if all(isinstance(item, str) for item in items) else ("", [])
    bullets = [_BULLET.fullmatch(line) for line in lines]
    if lines and all(bullets):
        return "bullets", [match[1] for match in bullets if match]
    numbers = [_NUMBER.fullmatch(line) for line in lines]
    if lines and all(numbers):
        in_order = [int(match[1]) for match in numbers if match] == list(range(1, len(lines) + 1))
        return "numbers" if in_order else "", [match[2] for match in numbers if match]
    if len(lines) > 1:
        return ("lines" if not any(map(_is_marked, lines)) else ""), lines
    return "commas", [part.strip() for part in text.strip().rstrip(".").split(",")]


def items_languages(items: list[str]) -> set[str]:
    """The languages of the most items by the lists of [`otpo.data.constraints.words`], several where words are shared.

    Items that no list has count for none, and half of the items have to be known; the set is empty otherwise.
    """
    counts = {code: sum(_bare(item) in _known(code) for item in items) for code in LANGUAGES}
    most = max(counts.values())
    return {code for code, count in counts.items() if count == most} if most and 2 * most >= len(items) else set()


def _count_is_right(items: list[str], count: int) -> bool:
    names = [_bare(item) for item in items]
    fine = all(name and len(name.split()) <= _LONGEST_ITEM for name in names) and len(set(names)) == len(names)
    return bool(items) and fine and count in (0, len(items))


def _is_written_as(text: str, form: str) -> bool:
    if form == "capitals":
        return text == text.upper() and any(map(str.isalpha, text))
    if form == "exclamation":
        return text.endswith("!")
    if form == "quotes":
        return len(text) > 1 and text.startswith('"') and text.endswith('"') and text.count('"') == 2
    return form == "text"


def _is_marked(line: str) -> bool:
    return bool(_BULLET.fullmatch(line) or _NUMBER.fullmatch(line))


def _words(text: str) -> int:
    return len(re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text))


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()) is not None


def _bare(item: str) -> str:
    return item.strip(" .;\"'").casefold()


@cache
def _known(code: str) -> frozenset[str]:
    return frozenset(word.casefold() for of in ITEMS.values() for word in of[code])
