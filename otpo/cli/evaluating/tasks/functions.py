"""What our tasks' YAML files name: rows about products that are in no training split, and checks of answers."""

from typing import Any

from datasets import Dataset

from otpo.data import load_demo_preferences
from otpo.data.ecommerce.answers import check_answer


def pairs(**kwargs: Any) -> dict[str, Dataset]:
    """The bundled test pairs as a prompt, two answers and the place of the right one, which alternates."""
    return {"test": Dataset.from_list([_as_choice(place, row) for place, row in enumerate(_rows())])}


def prompts(**kwargs: Any) -> dict[str, Dataset]:
    """The prompts of the bundled test pairs, with what a right answer holds."""
    return {
        "test": Dataset.from_list([{"text": row["prompt"][0]["content"], "answer": row["answer"]} for row in _rows()])
    }


def check(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 or 0 for each check of a free answer."""
    return {name: float(right) for name, right in check_answer(doc, results[0].strip()).items()}


def _rows() -> Any:
    return load_demo_preferences("test")


def _as_choice(place: int, row: Any) -> dict[str, Any]:
    answers = [row["chosen"][0]["content"], row["rejected"][0]["content"]]
    right = place % 2
    return {"text": row["prompt"][0]["content"], "choices": answers[::-1] if right else answers, "label": right}
