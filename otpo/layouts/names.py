"""The layouts of rows by name, apart from the code that knows them, so that options load quickly."""

from typing import Literal

RowLayout = Literal["auto", "padded", "packed", "shared_prompt"]

ROW_LAYOUTS: tuple[RowLayout, ...] = ("auto", "padded", "packed", "shared_prompt")
"""`auto`, then the layouts from the slowest to the fastest."""
