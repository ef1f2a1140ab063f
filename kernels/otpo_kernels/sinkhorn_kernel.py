"""The device code of the transport solver. The file is over 350 lines because it is one persistent kernel.

The mathematics is that of `otpo.transport.sinkhorn`, the float64 reference in plain torch: translation-invariant
sweeps in the log domain (arXiv 2201.00730) with Anderson acceleration. What is particular to the kernel:

- One launch solves all pairs. The programs form groups, a group solves one pair at a time, and its programs
  meet at barriers in memory, three in a sweep. A group stops when its pair has converged.
- A sweep reads the distances once: a program takes whole rows, so it knows a row's new potential before it adds
  the row to the columns' sums.
- Matrix entries are float32, potentials and everything summed over programs are float64. A potential enters as
  a whole number in the exponent and a factor beside it, so an exponent, and how it is rounded, stays the same
  while the potentials settle; otherwise the residual would not fall below 1e-5 when `reg` is small.
- Sums over programs are taken in the order of the programs, so results repeat bit by bit.

Potentials are in units of log2 here.
"""

# Triton's language is typed as Python, not as what `jit` makes of it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _meet(counter_ptr, arrived, PROGRAMS: tl.constexpr):
    """Waits until every program of the group is here and sees what the others have written."""
    tl.debug_barrier()
    if PROGRAMS > 1:
        arrived += PROGRAMS
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrived:
            pass
        tl.debug_barrier()
    return arrived


@triton.jit
def _solve(matrix, right, SIZE: tl.constexpr):
    """The solution of a positive definite system by Gauss-Jordan elimination, which needs no pivoting there."""
    at = tl.arange(0, SIZE)
    for k in tl.static_range(SIZE):
        pivot_row = tl.sum(tl.where(at[:, None] == k, matrix, 0.0), 0)
        pivot_column = tl.sum(tl.where(at[None, :] == k, matrix, 0.0), 1)
        pivot = tl.sum(tl.where(at == k, pivot_row, 0.0), 0)
        pivot_right = tl.sum(tl.where(at == k, right, 0.0), 0)
        factor = tl.where(at == k, 0.0, pivot_column) / pivot
        matrix -= factor[:, None] * pivot_row[None, :]
        right -= factor * pivot_right
    return right / tl.sum(tl.where(at[:, None] == at[None, :], matrix, 0.0), 1)


@triton.jit
def _log2(x):
    """The logarithm of positive normal float32 as float64, right to 1e-7; the hardware's errs by 2e-7 of its value."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the remaining factor is within [0.707, 1.414)
    factor = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    z = (factor - 1.0) / (factor + 1.0)
    square = z * z
    series = 1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square * (1.0 / 9.0))))
    return exponent.to(tl.float64) + (2.885390081777927 * z * series).to(tl.float64)


@triton.jit
def _exp2(x):
    """2**x in float32, right to 1e-7; the hardware's is right to 2e-7."""
    whole = tl.floor(x + 0.5)
    y = (x - whole) * 0.6931471805599453
    series = 1.0 + y * (1.0 + y * (0.5 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040)))))))
    return series * tl.exp2(whole)


@triton.jit
def _rows_pass(
    distance_ptr,
    a_ptr,
    last_a_ptr,
    b_ptr,
    begin,
    end,
    n,
    columns,
    scale,
    phi,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Updates the potentials of the rows `begin` to `end` and returns their part of the columns' masses."""
    cols = tl.arange(0, WIDTH)
    live = cols < n
    # Whole vectors are loaded, a row is as long as whole vectors; what lies past the count is never used.
    loaded = cols < tl.multiple_of(tl.cdiv(n, 16) * 16, 16)
    b = tl.load(b_ptr + cols, mask=live, other=0.0, cache_modifier=".cg")
    b_whole = tl.floor(b + 0.5)
    b_factor = _exp2((b - b_whole).to(tl.float32))
    b_whole = b_whole.to(tl.float32)
    column_mass = tl.zeros([WIDTH], tl.float32)
    for row in range(begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = rows < end
        at = distance_ptr + rows[:, None].to(tl.int64) * columns + cols[None, :]
        distance = tl.load(at, mask=inside[:, None] & loaded[None, :], other=0.0)
        a_whole = tl.floor(tl.load(last_a_ptr + rows, mask=inside, other=0.0) + 0.5).to(tl.float32)
        exponent = (a_whole[:, None] + b_whole[None, :]) - distance * scale
        exponent = tl.where(live[None, :], exponent, float("-inf"))
        top = tl.max(exponent, 1)
        share = tl.exp2(exponent - top[:, None]) * b_factor[None, :]
        top -= a_whole
        a = -phi * (top.to(tl.float64) + _log2(tl.sum(share, 1)))
        tl.store(a_ptr + rows, a, mask=inside)
        lift = _exp2(tl.minimum((a + top).to(tl.float32), 60.0))
        column_mass += tl.sum(share * tl.where(inside, lift, 0.0)[:, None], 0)
    return column_mass


# Another length or number of pairs must not mean another compilation.
@triton.jit(
    do_not_specialize=["first", "slots", "pairs", "rows", "rejected_stride_b", "index_stride_side", "index_stride_b"],
    do_not_specialize_on_alignment=["chosen_ptr", "rejected_ptr", "residual_ptr", "iterations_ptr", "counter_ptr"],
)
def sinkhorn_kernel(
    distance_ptr,
    largest_ptr,
    index_ptr,
    count_ptr,
    chosen_ptr,
    rejected_ptr,
    residual_ptr,
    iterations_ptr,
    a_ptr,
    b_ptr,
    history_ptr,
    column_mass_ptr,
    sums_ptr,
    counter_ptr,
    first,
    slots,
    pairs,
    rows,
    columns,
    rejected_stride_b,
    index_stride_side,
    index_stride_b,
    reg,
    reg_m,
    tolerance,
    max_iterations,
    RELEASE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROGRAMS_2: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    MEMORY: tl.constexpr,
    RIDGE: tl.constexpr,
    RESTART: tl.constexpr,
):
    """Solves the pairs `first` to `first + slots`; `num_programs / PROGRAMS` groups share them.

    Inputs: distances `(slots, rows, columns)` float32, `columns` a multiple of 16 from N; of `distance.ValidTokens`,
    `largest` `(2, B)`, `index` `(2, B, L)` and `count` `(2, B)`. Outputs: weights `(B, M)` and `(B, N)` float32,
    written at valid tokens, residual `(B,)` float32, iterations `(B,)` int32. Scratch: a `(groups, 2, rows)`,
    b `(groups, columns)`, history `(groups, 2 * MEMORY + 5, columns)` and sums `(groups, PROGRAMS, 2 * MEMORY + 3)`
    float64, column mass `(groups, PROGRAMS, columns)` float32, counter `(groups,)` int32, zero.

    A program reads the distances ROWS by WIDTH at a time, WIDTH being a power of two from `columns`, and treats
    vectors SLICE tokens at a time. RELEASE: the cost scale is taken over norms too.
    """
    # This program's group, its rank there, and the group's part of the scratch.
    group = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    groups = tl.num_programs(0) // PROGRAMS
    rank = tl.program_id(0) % PROGRAMS
    counter_ptr += group
    # What a sweep both reads and writes is kept twice, for the last sweep and for this one: a program's threads may
    # share an element, and one of them may write before another reads.
    a_ptr += group * 2 * rows
    b_ptr += group * columns
    # Of every column: MEMORY steps of x, MEMORY steps of f, twice x and f, the mass.
    history_ptr += group * (2 * MEMORY + 5) * columns
    state_ptr = history_ptr + 2 * MEMORY * columns
    final_ptr = state_ptr + 4 * columns
    column_mass_ptr += group * PROGRAMS * columns
    # Of every program: MEMORY products with the newest step, MEMORY with f, the residual, two masses.
    sums_ptr += group * PROGRAMS * (2 * MEMORY + 3)
    mine_ptr = sums_ptr + rank * (2 * MEMORY + 3)
    k = tl.arange(0, MEMORY)
    ranks = tl.arange(0, PROGRAMS_2)
    all_ranks = ranks < PROGRAMS
    theirs_ptr = sums_ptr + ranks * (2 * MEMORY + 3)
    arrived = 0
    # Scalars arrive as float32: from these on, phi and the ratio must fit each other to float64's precision.
    ratio = tl.cast(reg, tl.float64) / tl.cast(reg_m, tl.float64)
    phi = 1.0 / (1.0 + ratio)

    for slot in range(group, slots, groups):
        pair = first + slot
        m = tl.load(count_ptr + pair)
        n = tl.load(count_ptr + pairs + pair)
        if (m > 0) & (n > 0):
            # The cost's scale, and this program's share of the rows and columns.
            largest = tl.load(largest_ptr + pairs + pair).to(tl.float32, bitcast=True)
            norm = tl.load(largest_ptr + pair).to(tl.float32, bitcast=True)
            # NaN where a state is not finite: sums and maxima of the sweeps would hide it.
            spoiled = tl.where(norm < float("inf"), 0.0, float("nan")).to(tl.float64)
            if RELEASE:
                largest = tl.maximum(largest, norm) + 1e-6
            scale = 1.4426950408889634 / (reg * tl.maximum(largest, 1.0))
            row0 = tl.minimum(rank * tl.cdiv(m, PROGRAMS), m)
            row1 = tl.minimum(row0 + tl.cdiv(m, PROGRAMS), m)
            column0 = tl.minimum(rank * tl.cdiv(n, PROGRAMS), n)
            column1 = tl.minimum(column0 + tl.cdiv(n, PROGRAMS), n)
            matrix_ptr = distance_ptr + slot * rows * columns

            # Potentials of zero to start from, once the threads have read the last pair's.
            tl.debug_barrier()
            for start in range(row0, row1, SLICE):
                at = start + tl.arange(0, SLICE)
                tl.store(a_ptr + at, tl.zeros([SLICE], tl.float64), mask=at < row1)
                tl.store(a_ptr + rows + at, tl.zeros([SLICE], tl.float64), mask=at < row1)
            for start in range(column0, column1, SLICE):
                at = start + tl.arange(0, SLICE)
                tl.store(b_ptr + at, tl.zeros([SLICE], tl.float64), mask=at < column1)
            tl.store(mine_ptr + 2 * MEMORY + 2, (column1 - column0).to(tl.float64))
            arrived = _meet(counter_ptr, arrived, PROGRAMS)

            # The memory of the acceleration begins empty with every pair.
            gram = tl.zeros([MEMORY, MEMORY], tl.float64)
            remembered = tl.full([], 0, tl.int32)
            iteration = tl.full([], 0, tl.int32)
            best = tl.full([], float("inf"), tl.float64)
            residual = tl.full([], float("inf"), tl.float64)
            mass = tl.full([], 0.0, tl.float64)
            running = True
            while running:
                # Rows: new potentials, this program's part of the columns' masses, and the mass of its rows.
                iteration += 1
                this_a = a_ptr + iteration % 2 * rows
                last_a = a_ptr + (iteration + 1) % 2 * rows
                state = state_ptr + iteration % 2 * 2 * columns
                last_state = state_ptr + (iteration + 1) % 2 * 2 * columns
                part = _rows_pass(matrix_ptr, this_a, last_a, b_ptr, row0, row1, n, columns, scale, phi, WIDTH, ROWS)
                cols = tl.arange(0, WIDTH)
                tl.store(column_mass_ptr + rank * columns + cols, part, mask=cols < n)
                tl.debug_barrier()
                row_mass = tl.zeros([SLICE], tl.float64)
                for start in range(row0, row1, SLICE):
                    at = start + tl.arange(0, SLICE)
                    a = tl.load(this_a + at, mask=at < row1, other=0.0)
                    row_mass += tl.where(at < row1, tl.exp2(-ratio * a), 0.0)
                tl.store(mine_ptr + 2 * MEMORY + 1, tl.sum(row_mass, 0))
                arrived = _meet(counter_ptr, arrived, PROGRAMS)

                # Columns: the translation that fits both masses, the step f from x, its products with earlier steps.
                row_masses = tl.load(theirs_ptr + 2 * MEMORY + 1, mask=all_ranks, other=0.0, cache_modifier=".cg")
                column_masses = tl.load(theirs_ptr + 2 * MEMORY + 2, mask=all_ranks, other=0.0, cache_modifier=".cg")
                mass = tl.sum(row_masses, 0)
                shift = (tl.log2(mass) - tl.log2(tl.sum(column_masses, 0))) / (2.0 * ratio)
                newest = remembered % MEMORY
                remembered += (iteration > 1).to(tl.int32)
                with_newest = tl.zeros([MEMORY], tl.float64)
                with_step = tl.zeros([MEMORY], tl.float64)
                worst = tl.zeros([SLICE], tl.float64)
                for start in range(column0, column1, SLICE):
                    at = start + tl.arange(0, SLICE)
                    inside = at < column1
                    parts_at = column_mass_ptr + ranks[:, None] * columns + at[None, :]
                    both = all_ranks[:, None] & inside[None, :]
                    parts = tl.load(parts_at, mask=both, other=0.0, cache_modifier=".cg")
                    column_mass = tl.maximum(tl.sum(parts.to(tl.float64), 0), 1e-38)
                    b = tl.load(b_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
                    lse = tl.log2(column_mass) - b
                    worst = tl.where(inside, tl.maximum(worst, tl.abs(lse + b / phi)), worst)
                    x = b - shift
                    f = tl.where(inside, -phi * (lse + shift) - x, 0.0)
                    dx = x - tl.load(last_state + at, mask=inside, other=0.0)
                    df = tl.where(inside, f - tl.load(last_state + columns + at, mask=inside, other=0.0), 0.0)
                    tl.store(state + at, x, mask=inside)
                    tl.store(state + columns + at, f, mask=inside)
                    tl.store(final_ptr + at, column_mass, mask=inside)
                    here = at < tl.where(iteration > 1, column1, column0)  # no step before the second sweep
                    tl.store(history_ptr + newest * columns + at, dx, mask=here)
                    tl.store(history_ptr + (MEMORY + newest) * columns + at, df, mask=here)
                    known = (k[:, None] < remembered) & (k[:, None] != newest) & inside[None, :]
                    steps_at = history_ptr + (MEMORY + k[:, None]) * columns + at[None, :]
                    steps = tl.load(steps_at, mask=known, other=0.0)
                    steps = tl.where((k[:, None] == newest) & here[None, :], df[None, :], steps)
                    with_newest += tl.sum(steps * df[None, :], 1)
                    with_step += tl.sum(steps * f[None, :], 1)
                tl.store(mine_ptr + k, with_newest)
                tl.store(mine_ptr + MEMORY + k, with_step)
                tl.store(mine_ptr + 2 * MEMORY, tl.max(worst, 0))
                arrived = _meet(counter_ptr, arrived, PROGRAMS)

                # Every program takes the same residual from the same sums, so all of a group stop in the same sweep.
                residuals = tl.load(theirs_ptr + 2 * MEMORY, mask=all_ranks, other=0.0, cache_modifier=".cg")
                residual = tl.max(residuals, 0) / 1.4426950408889634 + spoiled
                running = (iteration < max_iterations) & (residual > tolerance)
                if running:
                    # The least-squares mix of remembered steps: each program solves the same small system, which costs
                    # less than one more meeting.
                    products_at = theirs_ptr[:, None] + k[None, :]
                    products = tl.load(products_at, mask=all_ranks[:, None], other=0.0, cache_modifier=".cg")
                    newest_row = tl.sum(products, 0)
                    products = tl.load(products_at + MEMORY, mask=all_ranks[:, None], other=0.0, cache_modifier=".cg")
                    right = tl.sum(products, 0)
                    if residual > RESTART * best:
                        remembered *= 0
                    best = tl.minimum(best, residual)
                    if iteration > 1:
                        gram = tl.where(k[:, None] == newest, newest_row[None, :], gram)
                        gram = tl.where(k[None, :] == newest, newest_row[:, None], gram)
                    known = k < remembered
                    matrix = tl.where(known[:, None] & known[None, :], gram, 0.0)
                    same = k[:, None] == k[None, :]
                    diagonal = tl.sum(tl.where(same, matrix, 0.0), 1)
                    unit = tl.where(diagonal > 0.0, 1.0 / tl.sqrt(tl.where(diagonal > 0.0, diagonal, 1.0)), 0.0)
                    matrix = matrix * unit[:, None] * unit[None, :] + tl.where(same, RIDGE, 0.0)
                    mix = _solve(matrix, tl.where(known, right, 0.0) * unit, MEMORY) * unit

                    # The accelerated potentials of the columns, and their mass for the next translation.
                    column_mass = tl.zeros([SLICE], tl.float64)
                    for start in range(column0, column1, SLICE):
                        at = start + tl.arange(0, SLICE)
                        inside = at < column1
                        x = tl.load(state + at, mask=inside, other=0.0)
                        f = tl.load(state + columns + at, mask=inside, other=0.0)
                        both = known[:, None] & inside[None, :]
                        steps_at = history_ptr + k[:, None] * columns + at[None, :]
                        steps = tl.load(steps_at, mask=both, other=0.0)
                        steps += tl.load(steps_at + MEMORY * columns, mask=both, other=0.0)
                        b = x + f - tl.sum(steps * mix[:, None], 0)
                        tl.store(b_ptr + at, b, mask=inside)
                        column_mass += tl.where(inside, tl.exp2(-ratio * b), 0.0)
                    tl.store(mine_ptr + 2 * MEMORY + 2, tl.sum(column_mass, 0))
                    arrived = _meet(counter_ptr, arrived, PROGRAMS)

            # Weights: the masses of the last sweep, scaled to the shorter response, at the tokens' own places.
            budget = tl.minimum(m, n).to(tl.float64) / mass + spoiled
            index_at = index_ptr + pair * index_stride_b
            for start in range(row0, row1, SLICE):
                at = start + tl.arange(0, SLICE)
                inside = at < row1
                token = tl.load(index_at + at, mask=inside, other=0)
                a = tl.load(a_ptr + iteration % 2 * rows + at, mask=inside, other=0.0)
                weight = tl.exp2(-ratio * a) * budget
                tl.store(chosen_ptr + pair * rows + token, weight.to(tl.float32), mask=inside)
            for start in range(column0, column1, SLICE):
                at = start + tl.arange(0, SLICE)
                inside = at < column1
                token = tl.load(index_at + index_stride_side + at, mask=inside, other=0)
                column_mass = tl.load(final_ptr + at, mask=inside, other=0.0)
                weight = column_mass * budget
                tl.store(rejected_ptr + pair * rejected_stride_b + token, weight.to(tl.float32), mask=inside)
            if rank == 0:
                tl.store(residual_ptr + pair, residual.to(tl.float32))
                tl.store(iterations_ptr + pair, iteration)
