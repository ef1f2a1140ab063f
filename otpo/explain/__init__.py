"""Looks at token weights: which tokens count, what they are aligned with, and what that does to the rewards.

`explain_rows` computes [`ExplainedPair`]s with a trainer's own code, `render_page` makes a self-contained HTML page of
them and `draw_picture` a PNG. `otpo explain` and [`otpo.callbacks.LogTokenWeightsCallback`] are made of these.
"""

from .page import render_page
from .pairs import ExplainedPair, ExplainedResponse, explain_rows, find_row
from .picture import draw_picture
from .pieces import Piece, split_pieces

__all__ = [
    "ExplainedPair",
    "ExplainedResponse",
    "Piece",
    "draw_picture",
    "explain_rows",
    "find_row",
    "render_page",
    "split_pieces",
]
