"""`otpo chat`: a conversation with a model in the terminal, or with two side by side."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from otpo.cli.options.typed_text import readable

if TYPE_CHECKING:  # at run time it is imported when options have been read, since it brings torch
    from rich.console import Console

_DESCRIPTION = """\
Chat with a model, or with an adapter on one, in the model's chat template; answers are shown while they are written.
With `--compare` two models answer side by side, each in a conversation of its own.

  otpo chat runs/align
  otpo chat Qwen/Qwen3-0.6B --compare runs/align --temperature 0

In the chat: /new begins a new conversation, /exit or Ctrl-D ends the chat, Ctrl-C ends an answer.
"""
_HELP = "/new begins a new conversation, /exit or Ctrl-D ends the chat, Ctrl-C ends an answer."


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="otpo chat",
        usage="otpo chat MODEL [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name on the Hub of a model, or an adapter's folder")
    add("--compare", metavar="OTHER", help="a second model, which answers beside the first")
    add("--system", metavar="TEXT", help="the system's message (none)")
    add("--max_new_tokens", type=int, default=512, metavar="N", help="of an answer at most (512)")
    add("--temperature", type=float, metavar="X", help="0 for the most probable token (the model's own choice)")
    add("--top_p", type=float, metavar="X", help="share of probability that is sampled from (the model's own choice)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of sampled answers; two models draw from it at the same time (0)",
    )
    add("--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16 (auto: the checkpoint's)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Chats until the input ends and returns 0, or 2 with one line for options or models that can't be used."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        parser.error(f"`--max_new_tokens` must be at least 1, got {options.max_new_tokens}.")
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        parser.error(f"`--temperature` must be at least 0, got {options.temperature:g}.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        parser.error(f"`--top_p` must be above 0 and at most 1, got {options.top_p:g}.")
    if options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        parser.error(f"`--dtype` must be auto, float32, bfloat16 or float16, got {options.dtype}.")
    from otpo.cli.running.command import REFUSALS, refuse

    try:
        _chat(options)
    except REFUSALS as error:
        return refuse(parser.prog, error)
    return 0


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is told; what is left out stays the model's own choice."""
    chosen: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    if options.temperature == 0:
        return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature is not None:
        chosen |= {"do_sample": True, "temperature": options.temperature}
    if options.top_p is not None:
        chosen |= {"do_sample": True, "top_p": options.top_p}
    return chosen


def _chat(options: argparse.Namespace) -> None:
    from rich.console import Console
    from transformers import set_seed

    from otpo.cli.chatting.screen import show_answers
    from otpo.cli.chatting.speaker import load_speaker
    from otpo.cli.models.loading import default_device, require_folder

    named = [("MODEL", options.model), *([("--compare", options.compare)] if options.compare else [])]
    for option, name in named:
        require_folder(option, name)
    device = options.device or default_device()
    chosen = generation_options(options)
    speakers = [load_speaker(option, name, options.system, device, options.dtype, chosen) for option, name in named]
    console = Console()
    console.print(f"{' and '.join(name for _, name in named)} on {device}. {_HELP}", style="dim", markup=False)

    set_seed(options.seed)
    for text in _said(console):
        if text == "/new":
            for speaker in speakers:
                speaker.forget()
            console.print("A new conversation.", style="dim")
        elif text.startswith("/"):
            console.print(_HELP, style="dim", markup=False)
        else:
            try:
                show_answers(console, speakers, text)
            except ValueError as error:  # too long a conversation, which the next line may end
                console.print(str(error), style="red", markup=False)


def _said(console: "Console") -> Iterator[str]:
    """What the user says, line by line, until the input ends or says so."""
    while True:
        try:
            text = console.input("[bold]> [/bold]") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if (not text and not sys.stdin.isatty()) or text.strip() in ("/exit", "/quit"):
            return
        if text.strip():
            yield readable(text.strip())


if __name__ == "__main__":
    sys.exit(main())
