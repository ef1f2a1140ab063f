"""Distances between the valid tokens of two responses, batched over pairs, in Triton.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, D hidden size.

`valid_tokens` lists each response's valid positions and their squared norms; `distances` works on those
lists alone, so prompts and padding cost neither reads nor products. Nothing waits for the host.

A distance comes from one matrix product, `|x|^2 + |y|^2 - 2 x.y`, accumulated in float32. Where the
two states are nearly equal that form cancels, as it does at every token of a shared prefix, so distances
below `NEAR` of the norms are computed again from the differences. Cosine distances take the product over the norms,
and `(|x - y|^2 - (|x| - |y|)^2) / (2 |x| |y|)`, which is the same, where the difference was taken.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NEAR = 2.0**-10
"""A squared distance below this share of the sum of the squared norms is computed from differences."""

WHOLE_BELOW = 1024
"""float32 states of fewer dimensions are multiplied in three bfloat16 parts and six products, others in two parts and
three products: what those drop, 2**-17 of a factor, averages to float32's own error over many dimensions alone."""

INTERPRETED = triton.knobs.runtime.interpret
"""Whether the kernels run on the CPU by Triton's interpreter (TRITON_INTERPRET=1)."""


class ValidTokens(NamedTuple):
    """The valid tokens of both responses, chosen first.

    Attributes:
        index: `(2, B, L)` int32, positions of the valid tokens in order; undefined past the count.
        squared: `(2, B, L)` float32, their squared norms.
        count: `(2, B)` int32.
        largest: `(2, B)` int32, the bits of two non-negative float32: the largest norm of a pair's states, infinite
            if one of them is not finite, and the largest distance between them, zero until `distances` has run.
    """

    index: Tensor
    squared: Tensor
    count: Tensor
    largest: Tensor


@triton.jit(
    do_not_specialize=["tokens", "mask_stride_b", "index_stride_b"],
    do_not_specialize_on_alignment=["mask_ptr", "index_ptr", "squared_ptr", "count_ptr"],
)
def _valid_tokens_kernel(
    states_ptr,
    mask_ptr,
    index_ptr,
    squared_ptr,
    count_ptr,
    largest_ptr,
    tokens,
    hidden,
    state_stride_b,
    state_stride_t,
    mask_stride_b,
    index_stride_b,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    # Position of each token in the list: valid tokens of earlier blocks, counted here since programs do not wait.
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, TOKENS)
    mask_ptr += pair * mask_stride_b
    before = 0
    for start in range(0, block * TOKENS, TOKENS):
        before += tl.sum(tl.load(mask_ptr + start + lanes).to(tl.int32), 0)
    token = block * TOKENS + lanes
    valid = tl.load(mask_ptr + token, mask=token < tokens, other=0).to(tl.int32)
    position = before + tl.cumsum(valid, 0) - 1

    # Squared norms of the valid tokens alone: prompts and padding are not read.
    total = tl.zeros([TOKENS], tl.float32)
    row = states_ptr + pair * state_stride_b + token.to(tl.int64) * state_stride_t
    for start in range(0, hidden, HIDDEN):
        at = start + tl.arange(0, HIDDEN)
        inside = (valid[:, None] > 0) & (at[None, :] < hidden)
        x = tl.load(row[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    place = pair * index_stride_b + position
    tl.store(index_ptr + place, token, mask=valid > 0)
    tl.store(squared_ptr + place, total, mask=valid > 0)
    # Non-negative floats order as their bits, and a maximum of bits does not depend on the order. NaN counts as inf.
    norm = tl.where(total < float("inf"), tl.sqrt_rn(total), float("inf"))
    tl.atomic_max(largest_ptr + pair, tl.max(norm, 0).to(tl.int32, bitcast=True))
    if block == tl.num_programs(0) - 1:
        tl.store(count_ptr + pair, before + tl.sum(valid, 0))


@triton.jit(do_not_specialize=["first", "pairs", "index_stride_side", "index_stride_b"])
def _distance_kernel(
    chosen_ptr,
    rejected_ptr,
    index_ptr,
    squared_ptr,
    count_ptr,
    largest_ptr,
    distance_ptr,
    first,
    pairs,
    hidden,
    columns,
    near,
    chosen_stride_b,
    chosen_stride_t,
    rejected_stride_b,
    rejected_stride_t,
    index_stride_side,
    index_stride_b,
    distance_stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
    COSINE: tl.constexpr,
):
    # The tile of this program; tiles past either count have nothing to do, since the lists hold valid tokens first.
    slot = tl.program_id(1).to(tl.int64)
    pair = first + slot
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row0 = tl.program_id(0) // tiles_n * BLOCK_M
    column0 = tl.program_id(0) % tiles_n * BLOCK_N
    m = tl.load(count_ptr + pair)
    n = tl.load(count_ptr + pairs + pair)
    if (row0 < m) & (column0 < n):
        rows = row0 + tl.arange(0, BLOCK_M)
        cols = column0 + tl.arange(0, BLOCK_N)
        chosen_list = index_ptr + pair * index_stride_b
        rejected_list = chosen_list + index_stride_side
        valid = (rows[:, None] < m) & (cols[None, :] < n)
        squares = squared_ptr + pair * index_stride_b
        x_square = tl.load(squares + rows, mask=rows < m, other=0.0)
        y_square = tl.load(squares + index_stride_side + cols, mask=cols < n, other=0.0)
        x_base = chosen_ptr + pair * chosen_stride_b
        y_base = rejected_ptr + pair * rejected_stride_b
        # Rows past the count read some token; their results are masked.
        x_token = tl.load(chosen_list + tl.minimum(rows, m - 1)).to(tl.int64)
        y_token = tl.load(rejected_list + tl.minimum(cols, n - 1)).to(tl.int64)
        x_rows = x_base + x_token * chosen_stride_t
        y_rows = y_base + y_token * rejected_stride_t

        # The product in float32's precision: tensor cores multiply bfloat16, so PARTS of them stand for a float32.
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, hidden, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            if EVEN_K:
                x = tl.load(x_rows[:, None] + at[None, :])
                y = tl.load(y_rows[None, :] + at[:, None])
            else:
                x = tl.load(x_rows[:, None] + at[None, :], mask=at[None, :] < hidden, other=0.0)
                y = tl.load(y_rows[None, :] + at[:, None], mask=at[:, None] < hidden, other=0.0)
            if PARTS > 1:
                x_high = x.to(tl.bfloat16)
                y_high = y.to(tl.bfloat16)
                x -= x_high.to(tl.float32)
                y -= y_high.to(tl.float32)
                x_low = x.to(tl.bfloat16)
                y_low = y.to(tl.bfloat16)
                product = tl.dot(x_high, y_high, product)
                product = tl.dot(x_high, y_low, product)
                product = tl.dot(x_low, y_high, product)
                if PARTS > 2:
                    product = tl.dot(x_low, y_low, product)
                    product = tl.dot(x_high, (y - y_low.to(tl.float32)).to(tl.bfloat16), product)
                    product = tl.dot((x - x_low.to(tl.float32)).to(tl.bfloat16), y_high, product)
            else:
                product = tl.dot(x, y, product, input_precision="ieee")

        # The squared distance from the norms, and from differences where that form cancels.
        norms = x_square[:, None] + y_square[None, :]
        squared = norms - 2.0 * product
        close = valid & (squared < near * norms)
        from_differences = close
        # One round replaces the first close entry of each row; a shared prefix needs one round on its diagonal.
        while tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
            pick = tl.argmax(close.to(tl.int32), 1)
            any_close = tl.max(close.to(tl.int32), 1) > 0
            y_pick = tl.load(rejected_list + column0 + pick, mask=any_close, other=0).to(tl.int64)
            picked = y_base + y_pick * rejected_stride_t
            exact = tl.zeros([BLOCK_M], tl.float32)
            for start in range(0, hidden, BLOCK_K):
                at = start + tl.arange(0, BLOCK_K)
                inside = any_close[:, None] & (at[None, :] < hidden)
                x = tl.load(x_rows[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
                y = tl.load(picked[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
                exact += tl.sum((x - y) * (x - y), 1)
            here = close & (tl.arange(0, BLOCK_N)[None, :] == pick[:, None])
            squared = tl.where(here, exact[:, None], squared)
            close = close & ~here
        # The distance that was asked for, and its maximum for the cost's scale.
        if COSINE:
            x_norm = tl.sqrt_rn(x_square)[:, None]
            y_norm = tl.sqrt_rn(y_square)[None, :]
            both = x_norm * y_norm
            apart = x_norm - y_norm
            excess = tl.where(from_differences, 0.5 * (squared - apart * apart), both - product)
            cosine = tl.where(both > 0.0, excess / tl.where(both > 0.0, both, 1.0), 1.0)
            distance = tl.where(valid, tl.maximum(cosine, 0.0), 0.0)
        else:
            distance = tl.sqrt_rn(tl.where(valid, tl.maximum(squared, 0.0), 0.0))
        out = distance_ptr + slot * distance_stride_b + rows[:, None].to(tl.int64) * columns + cols[None, :]
        tl.store(out, distance, mask=valid)
        tl.atomic_max(largest_ptr + pairs + pair, tl.max(tl.max(distance, 1), 0).to(tl.int32, bitcast=True))


def valid_tokens(chosen: Tensor, rejected: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> ValidTokens:
    """Lists the valid tokens of every response.

    Args:
        chosen: `(B, M, D)` bfloat16, float16 or float32, the last dimension contiguous.
        rejected: `(B, N, D)`, likewise.
        chosen_mask: `(B, M)` bool, the last dimension contiguous.
        rejected_mask: `(B, N)` bool, likewise.
    """
    pairs, length = len(chosen), max(chosen.size(1), rejected.size(1))
    lists = torch.empty(2, 2, pairs, length, dtype=torch.int32, device=chosen.device)
    index, squared = lists[0], lists[1].view(torch.float32)
    count = torch.empty(2, pairs, dtype=torch.int32, device=chosen.device)
    largest = torch.zeros(2, pairs, dtype=torch.int32, device=chosen.device)
    for side, (states, mask) in enumerate(((chosen, chosen_mask), (rejected, rejected_mask))):
        _valid_tokens_kernel[(triton.cdiv(states.size(1), _TOKENS), pairs)](
            states,
            mask.view(torch.uint8),
            index[side],
            squared[side],
            count[side],
            largest,
            states.size(1),
            states.size(2),
            states.stride(0),
            states.stride(1),
            mask.stride(0),
            length,
            TOKENS=_TOKENS,
            HIDDEN=_HIDDEN,
        )
    return ValidTokens(index, squared, count, largest)


def distances(
    chosen: Tensor, rejected: Tensor, tokens: ValidTokens, out: Tensor, first: int = 0, *, cosine: bool = False
) -> None:
    """Writes the distances of pairs `first` and following, and their maxima into `tokens.largest`.

    Products of bfloat16 and float16 states are exact and summed in float32. float32 states of `WHOLE_BELOW`
    dimensions or more are split into two bfloat16 parts and multiplied three times, which drops 2**-17 of each factor;
    over D terms that averages to float32's own error, at two thirds of the time of three tf32 products. Shorter states
    are split into three parts and multiplied six times, which drops 2**-25.

    Args:
        chosen: `(B, M, D)`, see [`valid_tokens`].
        rejected: `(B, N, D)`.
        tokens: The lists of the same states.
        out: `(P, M, W)` float32, contiguous, W at least N, best a multiple of 16; entry `[p, i, j]` belongs to the
            i-th valid chosen and the j-th valid rejected token of pair `first + p`. Entries past the counts are not
            written.
        first: Index of the first pair.
        cosine: Whether a distance is one less the cosine, 1 for a state of zeros, and not Euclidean.
    """
    # Tiles over all rows and columns, since the host does not know the counts; tiles past them end at once.
    pairs, hidden = len(chosen), chosen.size(2)
    _, rows, columns = out.shape
    parts = 1 if chosen.dtype != torch.float32 else 2 if hidden >= WHOLE_BELOW else 3
    tile = _tile(chosen.device, parts)
    grid = (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]), len(out))
    _distance_kernel[grid](
        chosen,
        rejected,
        tokens.index,
        tokens.squared,
        tokens.count,
        tokens.largest,
        out,
        first,
        pairs,
        hidden,
        columns,
        NEAR,
        chosen.stride(0),
        chosen.stride(1),
        rejected.stride(0),
        rejected.stride(1),
        tokens.index.stride(0),
        tokens.index.stride(1),
        out.stride(0),
        EVEN_K=hidden % tile["BLOCK_K"] == 0,
        PARTS=parts,
        COSINE=cosine,
        **tile,
    )


_TOKENS = 16
_HIDDEN = 512


_SHARED_MEMORY = 160 << 10  # bytes that the large tile may take


def _tile(device: torch.device, parts: int) -> dict[str, int]:
    if INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < _SHARED_MEMORY:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    # The best of eleven tiles on an H100, for all dtypes; a third part has no room in shared memory beside 64 columns.
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32 if parts == 3 else 64, "num_warps": 8, "num_stages": 4}
