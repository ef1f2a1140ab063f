"""The index of the memcpy operator in Triton: stable, without a sort, atomics or a wait for the host.

Shapes: N slots, cut into blocks of `BLOCK`, E experts, S sources, R rows.

Three kernels: each block counts its slots by expert; the counts are summed over the blocks before; each slot adds to
that sum its own rank within the block, which is the number of equal indices before it. The cost of the last step does
not depend on the number of experts.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256
_CHUNK = 16  # experts that a program handles at a time
_SCANNED = 128  # blocks of slots summed at a time


@triton.jit
def _expert(index_ptr, slot, slots, experts):
    """Experts of some slots as int32, -1 where there is none."""
    index = tl.load(index_ptr + slot, mask=slot < slots, other=-1)
    return tl.where((index >= 0) & (index < experts), index, -1).to(tl.int32)


@triton.jit(do_not_specialize=["slots"])
def _count_kernel(index_ptr, before_ptr, slots, experts, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    block = tl.program_id(0)
    expert = _expert(index_ptr, block * BLOCK + tl.arange(0, BLOCK), slots, experts)
    for first in range(0, experts, CHUNK):
        chunk = first + tl.arange(0, CHUNK)
        counts = tl.sum((expert[:, None] == chunk[None, :]).to(tl.int32), 0)
        tl.store(before_ptr + block * experts + chunk, counts, mask=chunk < experts)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(before_ptr, counts_ptr, blocks, experts, SCANNED: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.int32)
    for first in range(0, blocks, SCANNED):
        block = first + tl.arange(0, SCANNED)
        at = before_ptr + block[:, None] * experts + chunk[None, :]
        inside = (block[:, None] < blocks) & (chunk[None, :] < experts)
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + chunk, total, mask=chunk < experts)


@triton.jit(do_not_specialize=["slots"])
def _place_kernel(
    index_ptr,
    before_ptr,
    counts_ptr,
    destinations_ptr,
    offsets_ptr,
    slots,
    experts,
    alignment,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    slot = block * BLOCK + lanes
    expert = _expert(index_ptr, slot, slots, experts)
    same = (expert[:, None] == _expert(index_ptr, slot, slots, experts)[None, :]) & (lanes[None, :] < lanes[:, None])
    rank = tl.sum(same.to(tl.int32), 1)

    group = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + group, mask=group < experts, other=0)
    padded = tl.cdiv(counts, alignment) * alignment
    end = tl.cumsum(padded, 0)
    if block == 0:
        tl.store(offsets_ptr + group, end, mask=group < experts)
    begin = tl.gather(end - padded, tl.maximum(expert, 0), 0)
    before = tl.load(before_ptr + block * experts + expert, mask=expert >= 0, other=0)
    tl.store(destinations_ptr + slot, tl.where(expert >= 0, begin + before + rank, -1), mask=slot < slots)


@triton.jit(do_not_specialize=["rows"])
def _chunk_kernel(
    counts_ptr,
    destinations_ptr,
    offsets_ptr,
    totals_ptr,
    rows,
    sources,
    experts,
    alignment,
    BLOCK: tl.constexpr,
    SOURCES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    source = tl.arange(0, SOURCES)
    group = tl.arange(0, EXPERTS)
    inside = (source[:, None] < sources) & (group[None, :] < experts)
    counts = tl.load(counts_ptr + source[:, None] * experts + group[None, :], mask=inside, other=0).to(tl.int32)
    totals = tl.sum(counts, 0)
    padded = tl.cdiv(totals, alignment) * alignment
    offsets = tl.cumsum(padded, 0)
    new_begin = (offsets - padded)[None, :] + tl.cumsum(counts, 0) - counts
    of_source = tl.sum(counts, 1)
    old_end = (tl.cumsum(of_source, 0) - of_source)[:, None] + tl.cumsum(counts, 1)
    shift = tl.reshape(new_begin - old_end + counts, [SOURCES * EXPERTS])
    old_end = tl.reshape(old_end, [SOURCES * EXPERTS])

    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.sum((old_end[None, :] <= row[:, None]).to(tl.int32), 1)
    taken = row < tl.sum(totals, 0)
    shift = tl.gather(shift, tl.minimum(chunk, SOURCES * EXPERTS - 1), 0)
    tl.store(destinations_ptr + row, tl.where(taken, row + shift, -1), mask=row < rows)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + group, offsets, mask=group < experts)
        tl.store(totals_ptr + group, totals, mask=group < experts)


def route(top_k_index: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Destinations, offsets and counts; see `routing.route`."""
    top_k_index = top_k_index.contiguous()
    slots, device = top_k_index.numel(), top_k_index.device
    destinations = torch.empty(top_k_index.shape, dtype=torch.int32, device=device)
    blocks = triton.cdiv(slots, _BLOCK)
    if blocks == 0:
        offsets, counts = torch.zeros(2, num_experts, dtype=torch.int32, device=device).unbind()
        return destinations, offsets, counts.clone()
    offsets, counts = (torch.empty(num_experts, dtype=torch.int32, device=device) for _ in range(2))
    before = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    with torch.cuda.device_of(top_k_index):
        _count_kernel[(blocks,)](top_k_index, before, slots, num_experts, BLOCK=_BLOCK, CHUNK=_CHUNK)
        grid = (triton.cdiv(num_experts, _CHUNK),)
        _scan_kernel[grid](before, counts, blocks, num_experts, SCANNED=_SCANNED, CHUNK=_CHUNK)
        _place_kernel[(blocks,)](
            top_k_index,
            before,
            counts,
            destinations,
            offsets,
            slots,
            num_experts,
            alignment,
            BLOCK=_BLOCK,
            EXPERTS=triton.next_power_of_2(num_experts),
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
    return destinations, offsets, counts


def route_by_counts(counts: Tensor, rows: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Destinations, offsets and totals; see `routing.route_by_counts`."""
    counts = counts.contiguous()
    sources, experts = counts.shape
    destinations = torch.empty(rows, 1, dtype=torch.int32, device=counts.device)
    offsets, totals = (torch.empty(experts, dtype=torch.int32, device=counts.device) for _ in range(2))
    with torch.cuda.device_of(counts):
        _chunk_kernel[(max(1, triton.cdiv(rows, _BLOCK)),)](
            counts,
            destinations,
            offsets,
            totals,
            rows,
            sources,
            experts,
            alignment,
            BLOCK=_BLOCK,
            SOURCES=triton.next_power_of_2(sources),
            EXPERTS=triton.next_power_of_2(experts),
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
    return destinations, offsets, totals
