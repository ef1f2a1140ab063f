"""Token weights from unbalanced optimal transport, in Triton: three kernels and no wait for the host.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one, D hidden size.

`token_transport` lists the valid tokens, takes their distances (`distance.py`) and runs the solver
(`sinkhorn_kernel.py`); pairs whose distances do not fit the byte budget together go through in chunks.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .acceleration import MEMORY, RESTART, RIDGE
from .distance import INTERPRETED, distances, valid_tokens
from .sinkhorn_kernel import sinkhorn_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of hidden states that the kernels take."""

SMALLEST = {"reg": 0.01, "reg_m": 0.02, "tolerance": 1e-6}
"""Least values of options, for costs in [0, 1]. Below this `reg`, exponents leave float32's range; below this `reg_m`,
masses do, which span exp(-1 / reg_m); and rounding of float32 matrices leaves residuals of 1e-7 to 7e-7."""

LONGEST = 32768
"""Positions of a response that one program's row of distances can hold."""


class TokenTransport(NamedTuple):
    """Weights `(B, M)` and `(B, N)` float32, residual `(B,)` float32 and iterations `(B,)` int32."""

    chosen: Tensor
    rejected: Tensor
    residual: Tensor
    iterations: Tensor


@torch.no_grad()
def token_transport(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    reg: float,
    reg_m: float,
    cosine: bool = False,
    release_scale: bool = True,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    memory_budget: int = 1 << 30,
) -> TokenTransport:
    """Marginals of the unbalanced transport plan of every pair, scaled to `min(|y_c|, |y_r|)`.

    Against the float64 solution of the same states the weights are right to 1e-5 of their value, usually to
    1e-6, and to 3e-4 at `reg` 0.02 where all states share a part ten times as large as what tells them apart. Nothing
    waits for the device.

    Args:
        chosen: Hidden states `(B, M, D)` in one of `DTYPES`, norms below 1e18. A pair with a state that is not
            finite, or larger, gets NaN weights and a NaN residual. Cosines want norms of zero or above 1e-16, since
            squares are taken in float32.
        rejected: `(B, N, D)` of the same dtype.
        chosen_mask: `(B, M)` bool, true at real tokens; any pattern.
        rejected_mask: `(B, N)` bool.
        reg: Weight of the entropy term, at least 0.01.
        reg_m: Weight of the marginal terms, at least 0.02.
        cosine: Costs are one less the cosine of two states, 1 for a state of zeros, not their Euclidean distance.
        release_scale: Divide the costs by the maximum over distances and norms, not over distances alone; cosines are
            divided by the latter either way.
        tolerance: A pair is done when its residual is at most this, at least 1e-6.
        max_iterations: Sweeps at most.
        memory_budget: Bytes of distances held at a time, at least one pair's: pairs go through in chunks.

    Raises:
        ValueError: A dtype, a length or an option is outside what the kernels take.
    """
    # Refuse what the kernels would get wrong: their range is narrower than that of the float64 reference.
    if chosen.dtype not in DTYPES or rejected.dtype != chosen.dtype:
        raise ValueError(f"hidden states must share a dtype of {DTYPES}, got {chosen.dtype} and {rejected.dtype}.")
    if max(chosen.size(1), rejected.size(1)) > LONGEST:
        raise ValueError(f"responses may have {LONGEST} positions, got {chosen.size(1)} and {rejected.size(1)}.")
    for (name, least), value in zip(SMALLEST.items(), (reg, reg_m, tolerance), strict=True):
        if not least <= value < float("inf"):
            raise ValueError(f"`{name}` must be finite and at least {least:g} for the kernels, got {value}.")

    # Chunks of pairs whose distances fit the byte budget.
    pairs, rows, _ = chosen.shape
    columns = rejected.size(1)
    stride = 16 * triton.cdiv(columns, 16)  # of a row of distances, so that every row begins with a whole vector
    device = chosen.device
    chunk = max(1, min(pairs, memory_budget // max(1, 4 * rows * stride)))
    plan = launch_plan(chunk, rows, columns, device)

    # One allocation and one fill for all that starts at zero: each costs as much host time as a kernel's launch.
    sizes = (pairs * rows, pairs * columns, pairs, pairs, triton.cdiv(pairs, chunk) * plan.groups)
    weights, other_weights, residual, iterations, counter = torch.zeros(
        sum(sizes), dtype=torch.float32, device=device
    ).split(sizes)
    counter = counter.view(torch.int32)
    result = TokenTransport(
        weights.view(pairs, rows), other_weights.view(pairs, columns), residual, iterations.view(torch.int32)
    )
    if pairs * rows * columns == 0:
        return result

    # Scratch that all chunks share; kernels index the last dimension by itself, so it has to be contiguous.
    chosen, rejected, chosen_mask, rejected_mask = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (chosen, rejected, chosen_mask, rejected_mask)
    )
    tokens = valid_tokens(chosen, rejected, chosen_mask, rejected_mask)
    distance = torch.empty(chunk, rows, stride, dtype=torch.float32, device=device)
    column_mass = torch.empty(plan.groups * plan.programs * stride, dtype=torch.float32, device=device)
    sizes = (2 * rows, stride, (2 * MEMORY + 5) * stride, plan.programs * (2 * MEMORY + 3))
    scratch = torch.empty(plan.groups * sum(sizes), dtype=torch.float64, device=device)
    a, b, history, sums = scratch.split([plan.groups * size for size in sizes])

    # The chunks follow each other on the stream, so that they can share the scratch without a wait.
    for first in range(0, pairs, chunk):
        slots = min(chunk, pairs - first)
        distances(chosen, rejected, tokens, distance[:slots], first, cosine=cosine)
        sinkhorn_kernel[(plan.groups * plan.programs,)](
            distance,
            tokens.largest,
            tokens.index,
            tokens.count,
            *result,
            a,
            b,
            history,
            column_mass,
            sums,
            counter[first // chunk * plan.groups :],
            first,
            slots,
            pairs,
            rows,
            stride,
            columns,
            tokens.index.stride(0),
            tokens.index.stride(1),
            reg,
            reg_m,
            tolerance,
            max_iterations,
            RELEASE=release_scale and not cosine,
            PROGRAMS=plan.programs,
            PROGRAMS_2=triton.next_power_of_2(plan.programs),
            WIDTH=plan.width,
            ROWS=plan.rows,
            SLICE=plan.slice,
            MEMORY=MEMORY,
            RIDGE=RIDGE,
            RESTART=RESTART,
            num_warps=plan.warps,  # pyright: ignore[reportCallIssue]
            # The programs wait for each other: all of them must be on the device at once.
            launch_cooperative_grid=plan.programs > 1,  # pyright: ignore[reportCallIssue]
        )
    return result


class LaunchPlan(NamedTuple):
    """How the solver's programs are laid out: `groups` of `programs`, each program on tiles `rows` by `width`."""

    groups: int
    programs: int
    width: int
    rows: int
    slice: int
    warps: int


def launch_plan(pairs: int, rows: int, columns: int, device: torch.device) -> LaunchPlan:
    """All pairs at a time, the programs that fit the device shared among them.

    Two programs of four warps fit a multiprocessor however many registers they take. Short responses take a power of
    two of programs, so that not every length is compiled anew.
    """
    width = max(16, triton.next_power_of_2(columns))
    if INTERPRETED:
        return LaunchPlan(groups=min(pairs, 2), programs=1, width=width, rows=16, slice=32, warps=4)
    resident = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    groups = min(pairs, resident)
    tile_rows = max(1, min(16, 4096 // width))
    programs = max(1, min(resident // groups, triton.next_power_of_2(triton.cdiv(rows, tile_rows))))
    return LaunchPlan(groups, programs, width, tile_rows, slice=32, warps=4)
