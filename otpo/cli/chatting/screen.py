"""Shows answers while they are written: one as plain text, two side by side."""

import queue
import threading
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .speaker import Speaker

_FRAMES = 8  # a second


def show_answers(console: Console, speakers: Sequence[Speaker], text: str) -> None:
    """Has each speaker answer and shows what they write; Ctrl-C ends the answers, not the conversation.

    Args:
        console: The terminal, or a file, which gets two answers when they are whole.
        speakers: One, or two.
        text: What the user says.

    Raises:
        ValueError: A conversation is longer than its model can read.
    """
    if len(speakers) == 1:
        _show_one(console, speakers[0], text)
    else:
        _show_both(console, speakers, text)


def _show_one(console: Console, speaker: Speaker, text: str) -> None:
    stopped = ""
    answer = speaker.answer(text)
    try:
        for piece in answer:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        stopped = " (stopped)"
        answer.close()  # pyright: ignore - a generator
    console.print(stopped, style="dim", markup=False, highlight=False)


def _show_both(console: Console, speakers: Sequence[Speaker], text: str) -> None:
    """Each speaker has a thread that reads its answer; this one draws what they have read."""
    written = [""] * len(speakers)
    failed: queue.Queue[BaseException] = queue.Queue()

    def read(place: int) -> None:
        try:
            for piece in speakers[place].answer(text):
                written[place] += piece
        except BaseException as error:
            failed.put(error)

    threads = [threading.Thread(target=read, args=(place,), daemon=True) for place in range(len(speakers))]
    for thread in threads:
        thread.start()
    live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
    try:
        if live is not None:
            live.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(1 / _FRAMES / len(threads))
            if live is not None:
                live.update(_side_by_side(speakers, written), refresh=True)
    except KeyboardInterrupt:
        for speaker in speakers:
            speaker.stop()
        for thread in threads:
            thread.join()
    finally:
        if live is not None:
            live.update(_side_by_side(speakers, written), refresh=True)
            live.stop()
    if not failed.empty():
        raise failed.get()
    if live is None:
        console.print(_side_by_side(speakers, written))


def _side_by_side(speakers: Sequence[Speaker], written: Sequence[str]) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in speakers:
        table.add_column(ratio=1)
    panels = [
        Panel(Text(answer.strip()), title=Text(speaker.name), title_align="left")
        for speaker, answer in zip(speakers, written, strict=True)
    ]
    table.add_row(*panels)
    return table
