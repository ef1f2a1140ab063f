"""A transport plan as a picture inside a page: SVG cells with labels for short pairs, pixels for long ones.

Shapes: M tokens of the chosen response (rows), N tokens of the rejected one (columns).
"""

import base64
import html
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

LABELLED = 48
"""Tokens of a response up to which its heat map has labels and a number for each cell."""
MOST_PIXELS = 480
"""Rows and columns of pixels at most; beyond that, a pixel is the largest entry of its block."""

_CELL, _MARGIN = 16, 96  # units of the SVG
_COLOUR = (59, 130, 246)  # is seen on white and on black


def render_plan(plan: Tensor, chosen_labels: Sequence[str], rejected_labels: Sequence[str]) -> str:
    """HTML of the plan's heat map, chosen tokens downwards and rejected tokens to the right.

    Args:
        plan: `(M, N)`, non-negative.
        chosen_labels: M labels.
        rejected_labels: N labels.
    """
    if max(plan.shape) <= LABELLED:
        return _cells(plan, chosen_labels, rejected_labels)
    rows, columns = (min(size, MOST_PIXELS) for size in plan.shape)
    pooled = torch.nn.functional.adaptive_max_pool2d(plan[None], (rows, columns))[0]
    picture = base64.b64encode(png(_shares(pooled))).decode("ascii")
    alternative = f"Transport plan, {plan.size(0)} chosen tokens down, {plan.size(1)} rejected tokens across"
    return (
        f'<img class="plan" alt="{alternative}" src="data:image/png;base64,{picture}" '
        f'style="aspect-ratio:{columns}/{rows}">'
    )


def png(alpha: Tensor) -> bytes:
    """A PNG in one colour, as opaque as `alpha` `(H, W)`, in [0, 1], says."""
    height, width = alpha.shape
    pixels = torch.empty(height, width, 4, dtype=torch.uint8)
    pixels[..., :3] = torch.tensor(_COLOUR, dtype=torch.uint8)
    pixels[..., 3] = (alpha * 255).round().to(torch.uint8)
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], 1)  # filter 0 before each
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _shares(plan: Tensor) -> Tensor:
    """The plan over its largest entry."""
    return plan / plan.max().clamp(min=torch.finfo(plan.dtype).tiny)


def _cells(plan: Tensor, chosen_labels: Sequence[str], rejected_labels: Sequence[str]) -> str:
    height, width = (_MARGIN + _CELL * size for size in plan.shape)
    parts = [
        f'<svg class="plan" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Transport plan, chosen tokens down, rejected tokens across">'
    ]
    for row, label in enumerate(chosen_labels):
        y = _MARGIN + _CELL * row + _CELL - 5
        parts.append(f'<text x="{_MARGIN - 4}" y="{y}" text-anchor="end">{html.escape(label)}</text>')
    for column, label in enumerate(rejected_labels):
        x = _MARGIN + _CELL * column + _CELL - 5
        parts.append(f'<text transform="translate({x} {_MARGIN - 4}) rotate(-90)">{html.escape(label)}</text>')
    masses, shares = plan.tolist(), _shares(plan).tolist()
    for row, chosen in enumerate(chosen_labels):
        for column, rejected in enumerate(rejected_labels):
            title = html.escape(f"{chosen} → {rejected}: {masses[row][column]:.4g}")
            parts.append(
                f'<rect x="{_MARGIN + _CELL * column}" y="{_MARGIN + _CELL * row}" width="{_CELL}" height="{_CELL}" '
                f'fill-opacity="{shares[row][column]:.3f}"><title>{title}</title></rect>'
            )
    return "".join(parts) + "</svg>"
