"""What a profile of some steps says of steps that nobody profiled."""

import pytest
import torch

from benchmarks.step_clock import Clock, Span, idle_of

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


def test_a_clock_says_it_of_its_timed_steps():
    for device, idle in (("cuda", 0.4), ("cpu", 0.7)):  # where calls stand for kernels it is of the profiled ones
        clock = Clock(Span(4, 5, 2), torch.device(device))
        clock.kernels, clock.window_s, clock.idle_share = KERNELS, 5e-3, 0.7
        assert clock.idle_of_timed == pytest.approx(idle)
