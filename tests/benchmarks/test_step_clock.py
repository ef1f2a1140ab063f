"""What a profile of some steps says of steps that nobody profiled."""

import pytest

from benchmarks.step_clock import idle_of

KERNELS = [
    {"ts": 0.0, "dur": 300.0},
    {"ts": 100.0, "dur": 400.0},  # 500 us with a kernel
    {"ts": 2000.0, "dur": 700.0},  # after a wait that the profiler made longer
]


def test_idle_time_is_of_a_step_that_nobody_profiled():
    # 600 us of work a step.
    assert idle_of(KERNELS, 2, 1e-3) == pytest.approx(0.4)
    assert idle_of(KERNELS, 2, 600e-6) == pytest.approx(0.0, abs=1e-12)
    assert idle_of(KERNELS, 2, 500e-6) == 0.0
