"""Prompts of a dataset's rows: found, looked at, and made into tokens that an answer follows."""

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from otpo.data.row_checks import text_problem
from otpo.data.templates import tools_of

_IMAGES = ("image", "images")
_PROMPTS = ("prompt", "messages")
CARRIED = ("tools", "chat_template_kwargs")
"""Columns that TRL hands to the chat template too, and that a pair therefore keeps."""


def find_prompt(row: Mapping[str, Any]) -> Any:
    """The prompt of a row: its `prompt`, or its `messages` without the assistant's that ends them.

    Messages that end with another role's are a question that is open, and stay whole.

    Raises:
        ValueError: There is none to answer, as the end of "row 3 ...".
    """
    if any(row.get(column) for column in _IMAGES):
        raise ValueError("has images, which `otpo pairs` does not read")
    if row.get("prompt") is not None:
        prompt = row["prompt"]
    elif row.get("messages") is not None:
        prompt = _without_last_answer(row["messages"])
    elif "prompt" in row or "messages" in row:
        raise ValueError("has no prompt: " + " and ".join(f"{name!r} is null" for name in _PROMPTS if name in row))
    else:
        raise ValueError(f"has neither 'prompt' nor 'messages' but {sorted(row)}; rename yours to 'prompt'")
    problem = text_problem(prompt, "prompt")
    if problem is not None:
        raise ValueError(problem)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("has an empty prompt")
    if isinstance(prompt, str):
        return prompt
    if prompt[-1]["role"] == "assistant":
        raise ValueError("has a prompt that ends with the assistant's message, so there is nothing to answer")
    tools_of(row)  # which says what is wrong with them
    settings = row.get("chat_template_kwargs")
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"has {settings!r} in 'chat_template_kwargs', which must be a mapping of options by name")
    return prompt


def prompt_tokens(tokenizer: Any, prompt: Any, row: Mapping[str, Any]) -> list[int]:
    """The tokens of a prompt, by the chat template where it is messages, up to where the answer begins.

    Args:
        tokenizer: Of the model.
        prompt: Of [`find_prompt`].
        row: Its row, whose `tools` and `chat_template_kwargs` the template gets.

    Raises:
        ValueError: The template can't write it, as the end of "row 3 ...".
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    settings = row.get("chat_template_kwargs") or {}
    taken = sorted({"tools", *options} & set(settings))
    if taken:
        raise ValueError(f"has {taken} in 'chat_template_kwargs', which are set here. Leave them out")
    try:
        made = tokenizer.apply_chat_template(prompt, tools=tools_of(row), **options, **settings)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"has a prompt that the chat template can't write: {error}") from error
    return list(made["input_ids"])


def _without_last_answer(messages: Any) -> Any:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return messages  # the check says what is wrong
    return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
