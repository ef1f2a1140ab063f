"""Times a trainer's steps from end to end, and how much of a few more the device had nothing to do."""

import itertools
import time
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from benchmarks.kernel_trace import busy_time, kernels_of


class Span(NamedTuple):
    """Steps to warm up, to time and to profile, in this order."""

    warmup: int
    steps: int
    profiled: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def idle_of(kernels: list[dict[str, Any]], steps: int, seconds: float) -> float:
    """The share of a step without a kernel, at least 0.

    Where kernels wait for other GPUs they are longer or shorter in profiled steps. On the CPU calls stand for kernels,
    which a profiler makes longer, so that it is 0 or says little.

    Args:
        kernels: Of profiled steps, all alike; times in microseconds.
        steps: How many.
        seconds: Of a step that nobody profiles, since a profiler slows the host down.
    """
    return max(0.0, 1 - busy_time(kernels) / 1e6 / steps / seconds)


class Clock(TrainerCallback):
    """Times steps from end to end without waiting for the device in any of them, then profiles a few more.

    The device is waited for where training begins, after the first step, and around the timed and the profiled steps.
    `idle_share` is of the profiled steps, whose host a profiler slows down. Where all steps are alike, `idle_of_timed`
    says it of the timed ones: the device's work is that of the profiled steps, the time is not.
    """

    def __init__(self, span: Span, device: torch.device) -> None:
        self.span, self.on_gpu = span, device.type == "cuda"
        self.begun = self.first_step_s = self.window_s = self.idle_share = 0.0
        self.host_marks: list[float] = []
        self.marks: list[Any] = []
        self.profile: Any = None
        self.kernels: list[dict[str, Any]] = []
        self.peak = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, (warmup, steps, profiled) = state.global_step, self.span
        if done == 1:
            self.first_step_s = self._now() - self.begun
        if done == warmup:
            self.window_s = -self._now()
        if warmup <= done <= warmup + steps:
            self._mark()
        if done == warmup + steps:
            self.window_s += self._now()
            self.peak = torch.cuda.max_memory_allocated() if self.on_gpu else 0
            activity = torch.profiler.ProfilerActivity
            self.profile = torch.profiler.profile(activities=[activity.CUDA if self.on_gpu else activity.CPU])
            self.profile.__enter__()
            self.begun = self._now()
        if done == warmup + steps + profiled:
            wall = self._now() - self.begun
            self.profile.__exit__(None, None, None)
            self.kernels = kernels_of(self.profile, on_gpu=self.on_gpu)  # a profile is read once
            self.idle_share = 1 - busy_time(self.kernels) / 1e6 / wall

    @property
    def idle_of_timed(self) -> float:
        """The share of a timed step in which the device had nothing to do, by what a profiled step keeps it busy.

        On the CPU that of the profiled steps: a profiler lengthens the calls that stand for kernels there.
        """
        if not self.on_gpu:
            return self.idle_share
        return idle_of(self.kernels, self.span.profiled, self.window_s / self.span.steps)

    def step_ms(self) -> list[float]:
        """Each timed step on the device's clock, or the host's where there is no GPU."""
        if not self.on_gpu:
            return self.host_ms()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(self.marks)]

    def host_ms(self) -> list[float]:
        """Each timed step on the host's clock, which runs ahead of the device where nothing waits."""
        return [1e3 * (end - start) for start, end in itertools.pairwise(self.host_marks)]

    def _mark(self) -> None:
        self.host_marks.append(time.perf_counter())
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()
