"""Gradients of grouped products for Hopper in Triton: the down projection's into SwiGLU, and those of the weights.

Shapes: T tokens, K slots of a token, R rows in the order of experts, E experts, D hidden size, F the experts' width.
Tiles and tables are those of [`otpo_kernels.grouped_product_kernels`].
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .distance import INTERPRETED
from .grouped_product_kernels import SMALL, Tile, launch, make_tiles, place
from .swiglu_kernels import swiglu_gradient, zero_tail

DOWN_GRADIENT_TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
)
WEIGHT_GRADIENT_TILES = (
    Tile(128, 128, 64, 4, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 4),
)
"""What `benchmarks/grouped_product.py` tries; the first of each is taken."""


@triton.jit
def _store_gradients(
    grad, weight, row, end, first, h_ptr, grad_h_ptr, weighted_ptr, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Stores the gradients of a tile of `h` and its weighted SwiGLU; gives the rows' products of SwiGLU and `grad`."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    inside = (row < end)[:, None] & (column < width)
    at = row.to(tl.int64)[:, None] * width
    gate = tl.load(h_ptr + 2 * at + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + 2 * at + width + column, mask=inside, other=0.0).to(tl.float32)
    activated, grad_gate, grad_up = swiglu_gradient(grad, gate, up)
    tl.store(grad_h_ptr + 2 * at + column, (weight * grad_gate).to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + 2 * at + width + column, (weight * grad_up).to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(weighted_ptr + at + column, (weight * activated).to(weighted_ptr.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, activated * grad, 0.0), 1)


@triton.jit
def _store_in_parts(
    grad,
    weight,
    row,
    end,
    first,
    h_ptr,
    grad_h_ptr,
    weighted_ptr,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    left, right = grad.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
    if PARTS == 2:
        dot = _store_gradients(left, weight, row, end, first, h_ptr, grad_h_ptr, weighted_ptr, width, ROWS, HALF)
        first += HALF
        dot += _store_gradients(right, weight, row, end, first, h_ptr, grad_h_ptr, weighted_ptr, width, ROWS, HALF)
    else:
        FEWER: tl.constexpr = PARTS // 2
        dot = _store_in_parts(left, weight, row, end, first, h_ptr, grad_h_ptr, weighted_ptr, width, ROWS, HALF, FEWER)
        dot += _store_in_parts(
            right, weight, row, end, first + HALF, h_ptr, grad_h_ptr, weighted_ptr, width, ROWS, HALF, FEWER
        )
    return dot


@triton.jit
def _down_gradient_kernel(
    grad_ptr,
    sources_ptr,
    down,
    tiles_ptr,
    ends_ptr,
    h_ptr,
    weights_ptr,
    grad_h_ptr,
    weighted_ptr,
    dots_ptr,
    row_tiles,
    rows,
    hidden,
    width,
    grad_stride,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
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
        source = tl.load(sources_ptr + tl.minimum(row, end - 1))
        grad_rows = grad_ptr + (source // K).to(tl.int64)[:, None] * grad_stride
        first = column_tile * COLUMNS
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, hidden, DEPTH):
            at = start + tl.arange(0, DEPTH)[None, :]
            grad = tl.load(grad_rows + at) if EVEN else tl.load(grad_rows + at, mask=at < hidden, other=0.0)
            product = tl.dot(grad, down.load([expert, start, first]).reshape(DEPTH, COLUMNS), product)
        weight = tl.load(weights_ptr + source).to(tl.float32)[:, None]
        # In parts: a whole tile of gate, up and their gradients at once does not fit the registers.
        dot = _store_in_parts(
            product, weight, row, end, first, h_ptr, grad_h_ptr, weighted_ptr, width, ROWS, COLUMNS, PARTS
        )
        tl.store(dots_ptr + column_tile.to(tl.int64) * rows + row, dot, mask=row < end)


@triton.jit
def _weight_gradient_kernel(
    gathered_ptr,
    dense,
    sources_ptr,
    ends_ptr,
    out_ptr,
    left_columns,
    right_columns,
    gathered_stride,
    K: tl.constexpr,
    GATHERED_LEFT: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    left_tiles = tl.cdiv(left_columns, ROWS)
    of_expert = left_tiles * tl.cdiv(right_columns, COLUMNS)
    expert = tl.program_id(0) // of_expert
    left_tile, right_tile = place(tl.program_id(0) % of_expert, left_tiles, tl.cdiv(right_columns, COLUMNS), GROUP)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    first_left = left_tile * ROWS
    first_right = right_tile * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    lane = tl.arange(0, DEPTH)
    # Which tokens to load is read a step ahead, so that their rows' loads wait for nothing.
    token = tl.load(sources_ptr + begin + lane, mask=begin + lane < end, other=-1) // K
    for start in range(begin, end, DEPTH):
        # Dense rows past the group's end are another group's or zeros; here, where they meet gathered ones, are zeros.
        taken = (start + lane < end)[:, None]
        gathered_rows = gathered_ptr + token.to(tl.int64)[:, None] * gathered_stride
        if GATHERED_LEFT:
            column = first_left + tl.arange(0, ROWS)[None, :]
            inside = taken if EVEN else taken & (column < left_columns)
            left = tl.load(gathered_rows + column, mask=inside, other=0.0)
            total = tl.dot(left.T, dense.load([start, first_right]), total)
        else:
            column = first_right + tl.arange(0, COLUMNS)[None, :]
            inside = taken if EVEN else taken & (column < right_columns)
            right = tl.load(gathered_rows + column, mask=inside, other=0.0)
            total = tl.dot(dense.load([start, first_left]).T, right, total)
        following = start + DEPTH + lane
        token = tl.load(sources_ptr + following, mask=following < end, other=-1) // K
    of_left = first_left + tl.arange(0, ROWS)[:, None]
    of_right = first_right + tl.arange(0, COLUMNS)[None, :]
    at = (expert.to(tl.int64) * left_columns + of_left) * right_columns + of_right
    inside = (of_left < left_columns) & (of_right < right_columns)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def down_gradient(
    grad: Tensor,
    sources: Tensor,
    slots: int,
    down: Tensor,
    h: Tensor,
    weights: Tensor,
    ends: Tensor,
    tile: Tile = DOWN_GRADIENT_TILES[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """The output's gradient back through the weighted sum, the down projection and SwiGLU.

    Args:
        grad: `(T, D)`, rows contiguous.
        sources: `(R,)` int32, each row's slot.
        slots: K.
        down: `(E, D, F)`, contiguous.
        h: `(R, 2 F)`.
        weights: `(T, K)`, contiguous.
        ends: `(E,)` int32.
        tile: Of a program.

    Returns:
        As `grouped_product.swiglu_backward_reference`; rows after the last group are zero.
    """
    tile = SMALL if INTERPRETED else tile
    _, hidden, width = down.shape
    rows, columns = len(h), triton.cdiv(width, tile.columns)
    grad_h, weighted = torch.empty_like(h), torch.empty(rows, width, dtype=h.dtype, device=h.device)
    dots = torch.empty(columns, rows, dtype=torch.float32, device=h.device)
    if not rows:
        return grad_h, weighted, dots.sum(0)
    weight = TensorDescriptor.from_tensor(down, [1, tile.depth, tile.columns])
    with torch.cuda.device_of(h):
        tiles = make_tiles(ends, rows, tile.rows)
        _down_gradient_kernel[(tiles.size(1) * columns,)](
            *(grad, sources, weight, tiles, ends, h, weights, grad_h, weighted, dots),
            *(tiles.size(1), rows, hidden, width, grad.stride(0)),
            K=slots,
            EVEN=hidden % tile.depth == 0,
            # A part takes 16 to 32 registers for each of gate, up and what comes of them.
            PARTS=8 if tile.rows * tile.columns >= 4096 * tile.warps else 4,
            **launch(tile),
        )
    for rows_of in (grad_h, weighted):
        zero_tail(rows_of, ends)
    return grad_h, weighted, dots.sum(0)


def weight_gradient(
    gathered: Tensor,
    dense: Tensor,
    sources: Tensor,
    slots: int,
    ends: Tensor,
    *,
    gathered_left: bool,
    tile: Tile = WEIGHT_GRADIENT_TILES[0],
) -> Tensor:
    """Of each group the product of its left rows, transposed, with its right rows; zero for a group without rows.

    Args:
        gathered: `(T, M)`, rows contiguous: a row for each token.
        dense: `(R, N)`, contiguous. Rows past the last group must be finite.
        sources: `(R,)` int32, each row's slot.
        slots: K.
        ends: `(E,)` int32.
        gathered_left: Whether the gathered rows are the left ones.
        tile: Of a program.

    Returns:
        `(E, M, N)`, or `(E, N, M)` where the gathered rows are the right ones, in the dtype of `dense`.
    """
    tile = SMALL if INTERPRETED else tile
    height, breadth = (m.size(1) for m in ((gathered, dense) if gathered_left else (dense, gathered)))
    out = torch.empty(len(ends), height, breadth, dtype=dense.dtype, device=dense.device)
    if not len(sources):
        return out.zero_()
    grid = (len(ends) * triton.cdiv(height, tile.rows) * triton.cdiv(breadth, tile.columns),)
    rows = TensorDescriptor.from_tensor(dense, [tile.depth, tile.columns if gathered_left else tile.rows])
    with torch.cuda.device_of(dense):
        _weight_gradient_kernel[grid](
            *(gathered, rows, sources, ends, out, height, breadth, gathered.stride(0)),
            K=slots,
            GATHERED_LEFT=gathered_left,
            EVEN=gathered.size(1) % (tile.rows if gathered_left else tile.columns) == 0,
            **launch(tile),
        )
    return out
