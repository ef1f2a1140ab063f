"""Pictures of weights, those of other weightings beside them, and what page and picture say of each."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from otpo.explain import ExplainedPair, ExplainedResponse, Piece, draw_picture, render_page


def pair_of(chosen: int, rejected: int) -> ExplainedPair:
    """A pair with as many tokens as that, all of one weight."""
    sides = []
    for count in (chosen, rejected):
        pieces = [Piece(f"{place} ", range(place, place + 1)) for place in range(count)]
        ones = torch.ones(count, dtype=torch.float64)
        sides.append(ExplainedResponse(pieces, ones, -ones, -ones, 0.1))
    return ExplainedPair("made up", "", *sides, torch.ones(chosen, rejected).double(), False, "uniform")


@pytest.mark.parametrize("sizes", [(1, 1), (0, 3), (90, 5)], ids=str)
def test_picture_of_weights_alone_with_others_beside_them(sizes):
    pair = pair_of(*sizes)
    rows = [torch.rand(size, dtype=torch.float64) for size in sizes]

    def drawn(**beside):
        picture = Image.open(io.BytesIO(draw_picture([replace(pair, beside=beside)], weights_only=True)))
        return np.asarray(picture.convert("RGB")).astype(int)

    alone, both, scaled = drawn(), drawn(diff=rows), drawn(diff=[3 * values for values in rows])
    assert alone.shape[1] == both.shape[1] == 1000 and both.shape[0] > alone.shape[0] > 100
    assert (both[: alone.shape[0] - 30] == alone[: alone.shape[0] - 30]).all()  # below what stood there
    shaded = [int(((picture[..., 2] - picture[..., 0]) > 20).sum()) for picture in (alone, both, scaled)]
    assert shaded[0] == 0  # all weights are equal
    if max(sizes) > 1:
        assert shaded[1] == shaded[2] > 100  # shades are relative, the heading tells the range
        assert (both != scaled).any()


def test_the_page_says_what_each_weighting_looks_at():
    shown = replace(pair_of(2, 2), weighting="otpo, ot_reg 0.05", beside={"diff": (torch.ones(2), torch.ones(2))})
    page = render_page([shown])
    assert "otpo, ot_reg 0.05: looks at what both responses share: marginal of the transport plan" in page
    assert "looks at the tokens that one response has and the other has not" in page
    own = render_page([replace(shown, weighting="a weighting of your own", beside={})])
    assert "a weighting of your own. Point at" in own and "looks at" not in own
