"""The answer formats that a buyer may ask for, written and recognised."""

import json

FORMATS = ("bullets", "lines", "commas", "json")


def write(format_name: str, facts: dict[str, str]) -> str:
    """Facts, as label and value, in one of [`FORMATS`]."""
    items = [f"{label}: {value}" for label, value in facts.items()]
    if format_name == "bullets":
        return "\n".join(f"- {item}" for item in items)
    if format_name == "lines":
        return "\n".join(items)
    return ", ".join(items) if format_name == "commas" else json.dumps(facts, ensure_ascii=False)


def recognise(text: str, items: int) -> str | None:
    """Which of [`FORMATS`] the text is in, given the number of facts it should hold; None if in none."""
    lines = text.strip().split("\n")
    if text.strip().startswith("{"):
        try:
            facts = json.loads(text)
        except json.JSONDecodeError:
            return None
        return "json" if isinstance(facts, dict) and len(facts) == items else None
    if len(lines) == items and all(line.startswith("- ") and ": " in line for line in lines):
        return "bullets"
    if len(lines) == items and items > 1 and all(not line.startswith("-") and ": " in line for line in lines):
        return "lines"
    parts = text.strip().split(", ")
    return "commas" if len(lines) == 1 and len(parts) == items and all(": " in part for part in parts) else None
