"""What a chat template writes behind an answer, found by having it write the conversation once more."""

import json
from collections.abc import Mapping
from typing import Any

_MARK = "\N{REFERENCE MARK}answer\N{REFERENCE MARK}"
"""Stands in the answer's place."""


def text_behind_answer(row: Mapping[str, Any], side: str, tokenizer: Any) -> str:
    """What the template writes behind the content of a last message with tool calls, which may repeat that content.

    Empty without tool calls.

    Args:
        row: Of messages, with the columns that TRL hands to the template: `prompt`, `tools`, `chat_template_kwargs`.
        side: `"chosen"` or `"rejected"`.
        tokenizer: Whose template it is.

    Raises:
        ValueError: The template does not write the content once, so it is not to be found.
    """
    messages = row.get(side)
    if not isinstance(messages, list) or not messages or not messages[-1].get("tool_calls"):
        return ""
    marked = [*(row.get("prompt") or []), *messages[:-1], {**messages[-1], "content": _MARK}]
    text = tokenizer.apply_chat_template(
        marked, tools=tools_of(row), tokenize=False, **(row.get("chat_template_kwargs") or {})
    )
    if text.count(_MARK) != 1:
        raise ValueError(
            f"The chat template writes the content of a message with tool calls {text.count(_MARK)} times. Leave the "
            "spans out, or use a template that writes it once."
        )
    return text.partition(_MARK)[2]


def tools_of(row: Mapping[str, Any]) -> Any:
    """A row's `tools` for a chat template, None without any; they may stand there as JSON, which TRL reads too.

    Raises:
        ValueError: They are text and no JSON, as the end of "row 3 ...".
    """
    tools = row.get("tools") or None
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) or None
    except ValueError as error:
        told = f"has text in 'tools' that is no JSON ({error}). Give a list of tools, or JSON of one"
        raise ValueError(told) from error
