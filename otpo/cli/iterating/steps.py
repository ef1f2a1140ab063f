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
from otpo.cli.models.experts import set_answering_experts
from otpo.pairs.any_length import attend_at_any_length
from otpo.pairs.prompts import prompt_tokens
from otpo.pairs.sampling import end_tokens

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
    words = [command, *words_of(options)]
    console.print(f"otpo {shlex.join(words)}", style="bold", highlight=False)
    code = otpo(words)
    if code:
        raise SystemExit(code)


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options by name as a command line has them."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Rows in lists of `size`, the last of which may be shorter."""
    for begin in range(0, len(rows), size):
        yield list(rows[begin : begin + size])


def load_for_answers(
    folder: str | Path, device: str | torch.device, revision: str = "main", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A model, in bfloat16 on a GPU, and its tokenizer, which pads on the left.

    Args:
        folder: Of the model, or its name on the Hub.
        device: Where it answers.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether code that comes with it is run.
    """
    dtype = "auto" if torch.device(device).type == "cpu" else torch.bfloat16
    options: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    model = model.to(device).eval()
    set_answering_experts(model)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left", **options)


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    tokens: int,
    size: int,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """A model's likeliest answer, token by token, to each prompt, which is read and ended as `otpo pairs` does.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Of [`otpo.pairs.prompts.find_prompt`]: texts, or conversations.
        tokens: Most tokens of an answer.
        size: Prompts answered at a time.
        rows: Of the prompts, whose `tools` and `chat_template_kwargs` the chat template gets; None without any.

    Returns:
        An answer for each prompt, without special tokens.
    """
    asked = [
        prompt_tokens(tokenizer, prompt, row)
        for prompt, row in zip(prompts, [{}] * len(prompts) if rows is None else rows, strict=True)
    ]
    written = greedy_tokens(model, tokenizer, asked, tokens, size)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in written]


@torch.no_grad()
def greedy_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, size: int
) -> list[list[int]]:
    """[`greedy_answers`] from tokens to tokens, without the one that ends an answer."""
    ends = end_tokens(model, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    answers = []
    for batch in batches(prompts, size):
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with attend_at_any_length():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=ends or None,
            )
        for written in output[:, width:].tolist():
            end = next((place for place, token in enumerate(written) if token in ends), None)
            answers.append(written[:end])
    return answers
