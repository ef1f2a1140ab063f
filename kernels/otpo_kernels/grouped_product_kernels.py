"""Grouped products for Hopper in Triton: rows gathered as they are loaded, SwiGLU and its gradient as they are stored.

Shapes: T tokens, K slots of a token, R rows in the order of experts, E experts, D hidden size, F the experts' width.

A row of a group is found through `sources`, its slot: K of them are one token. Rows come by cp.async, since Hopper's
copy engine gathers none; weights come by its descriptors. A table made on the device says which expert and which rows
a tile of rows has, so nothing waits for the host. Sums run in float32, in an order that shapes alone decide: tiles are
constants, tuned in no process.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .distance import INTERPRETED
from .swiglu_kernels import swiglu_of


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, its warps, and how many steps its loads run ahead.

    `columns` are those of an accumulator, of which `up` has two.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8  # tiles of rows that share a sweep of the columns, for the L2 cache


UP_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 64, 8, 4),
    Tile(256, 64, 64, 8, 3),
)
"""What `benchmarks/grouped_product.py` tries; the first is taken."""

SMALL = Tile(16, 16, 16, 4, 2, group=2)  # for the interpreter, so that small cases have many tiles


@triton.jit
def _tiles_kernel(ends_ptr, tiles_ptr, experts, length, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of each tile of rows the expert, and in the table's second half its first row."""
    expert = tl.program_id(0)
    lane = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + lane, mask=lane < experts, other=0)
    begins = tl.load(ends_ptr + lane - 1, mask=(lane > 0) & (lane < experts), other=0)
    tiles = tl.where(lane < experts, (ends - begins + ROWS - 1) // ROWS, 0)
    before = tl.sum(tl.where(lane < expert, tiles, 0), 0)
    here = tl.sum(tl.where(lane == expert, tiles, 0), 0)
    begin = tl.sum(tl.where(lane == expert, begins, 0), 0)
    for i in range(0, here):
        tl.store(tiles_ptr + before + i, expert)
        tl.store(tiles_ptr + length + before + i, begin + i * ROWS)


@triton.jit
def place(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile of rows and tile of columns: programs that run together share rows and columns."""
    of_group = GROUP * column_tiles
    first = program // of_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + program % of_group % size, program % of_group // size


@triton.jit
def _up_kernel(
    x_ptr,
    sources_ptr,
    weight,
    tiles_ptr,
    ends_ptr,
    h_ptr,
    a_ptr,
    row_tiles,
    hidden,
    width,
    x_stride,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tile, column_tile = place(tl.program_id(0), row_tiles, tl.cdiv(width, COLUMNS), GROUP)
    expert = tl.load(tiles_ptr + row_tile)
    if expert >= 0:
        row = tl.load(tiles_ptr + row_tiles + row_tile) + tl.arange(0, ROWS)
        end = tl.load(ends_ptr + expert)
        # Rows past the group's end read its last row; nothing of them is stored.
        token = tl.load(sources_ptr + tl.minimum(row, end - 1)) // K
        x_rows = x_ptr + token.to(tl.int64)[:, None] * x_stride
        first = column_tile * COLUMNS
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, hidden, DEPTH):
            at = start + tl.arange(0, DEPTH)[None, :]
            x = tl.load(x_rows + at) if EVEN else tl.load(x_rows + at, mask=at < hidden, other=0.0)
            of_gate = weight.load([2 * expert, first, start]).reshape(COLUMNS, DEPTH)
            of_up = weight.load([2 * expert + 1, first, start]).reshape(COLUMNS, DEPTH)
            gate = tl.dot(x, of_gate.T, gate)
            up = tl.dot(x, of_up.T, up)
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row < end)[:, None] & (column < width)
        at = row.to(tl.int64)[:, None] * width
        a = swiglu_of(gate, up).to(a_ptr.dtype.element_ty)
        tl.store(h_ptr + 2 * at + column, gate.to(h_ptr.dtype.element_ty), mask=inside)
        tl.store(h_ptr + 2 * at + width + column, up.to(h_ptr.dtype.element_ty), mask=inside)
        tl.store(a_ptr + at + column, a, mask=inside)


def up(
    x: Tensor, sources: Tensor, slots: int, gate_up: Tensor, ends: Tensor, tile: Tile = UP_TILES[0]
) -> tuple[Tensor, Tensor]:
    """The rows' tokens times their experts' `gate_up`, and SwiGLU of that.

    Args:
        x: `(T, D)`, rows contiguous.
        sources: `(R,)` int32, each row's slot.
        slots: K.
        gate_up: `(E, 2 F, D)`, contiguous.
        ends: `(E,)` int32, the row after each group's last.
        tile: Of a program.

    Returns:
        `h (R, 2 F)` and `swiglu(h) (R, F)`, in the dtype of `x`. Rows after the last group are not written.
    """
    tile = SMALL if INTERPRETED else tile
    experts, doubled, hidden = gate_up.shape
    width, rows = doubled // 2, len(sources)
    h = torch.empty(rows, doubled, dtype=x.dtype, device=x.device)
    a = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not rows:
        return h, a
    weight = TensorDescriptor.from_tensor(gate_up.view(2 * experts, width, hidden), [1, tile.columns, tile.depth])
    with torch.cuda.device_of(x):
        tiles = make_tiles(ends, rows, tile.rows)
        grid = (tiles.size(1) * triton.cdiv(width, tile.columns),)
        _up_kernel[grid](
            *(x, sources, weight, tiles, ends, h, a, tiles.size(1), hidden, width, x.stride(0)),
            K=slots,
            EVEN=hidden % tile.depth == 0,
            **launch(tile),
        )
    return h, a


def make_tiles(ends: Tensor, rows: int, height: int) -> Tensor:
    """Tiles of rows, each within a group.

    Returns:
        `(2, L)` int32: each tile's expert, -1 past the last tile, and its first row.
    """
    experts = len(ends)
    tiles = torch.full((2, triton.cdiv(rows, height) + experts), -1, dtype=torch.int32, device=ends.device)
    _tiles_kernel[(experts,)](
        ends, tiles, experts, tiles.size(1), ROWS=height, EXPERTS=triton.next_power_of_2(experts)
    )
    return tiles


def launch(tile: Tile) -> dict[str, int]:
    """What a kernel of products is launched with."""
    sizes = {"GROUP": tile.group, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return sizes | {"num_warps": tile.warps, "num_stages": tile.stages}
