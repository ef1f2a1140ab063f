"""What rounds and the demo share: running a command of `otpo`, and a model's own answers to held-out prompts."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_backbone  # noqa: F401 - makes Compass known to transformers
from otpo.cli.main import main as otpo

console = Console()
"""Where commands and tables are printed."""


def run(command: str, options: Mapping[str, Any]) -> None:
    """Runs a command of `otpo` after printing it.

    Args:
        command: Its name, such as `"align"`.
        options: Values by name, without dashes. A list gives an option several values.

    Raises:
        SystemExit: The command failed; the code is its own.
    """
    words = [command]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    console.print(f"otpo {shlex.join(words)}", style="bold", highlight=False)
    code = otpo(words)
    if code:
        raise SystemExit(code)


def batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Rows in lists of `size`, the last of which may be shorter."""
    for begin in range(0, len(rows), size):
        yield list(rows[begin : begin + size])


def load_for_answers(folder: Path, device: str) -> tuple[Any, Any]:
    """The model in a folder, in bfloat16 on a GPU, and its tokenizer, which pads on the left as generation needs."""
    dtype = "auto" if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Mapping[str, str]]], tokens: int, size: int
) -> list[str]:
    """A model's likeliest answer, token by token, to each conversation.

    Args:
        model: In evaluation mode.
        tokenizer: Pads on the left.
        prompts: Conversations that end with the user's message.
        tokens: Most tokens of an answer.
        size: Prompts answered at a time.

    Returns:
        An answer for each prompt, without special tokens.
    """
    answers = []
    for batch in batches(prompts, size):
        inputs = tokenizer.apply_chat_template(
            batch, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    return answers
