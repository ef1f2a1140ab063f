"""Times of regions of device work, read without making the training step wait."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTimer:
    """Collects the durations of timed regions in milliseconds.

    On CUDA a region is a pair of events in the stream, which costs no synchronisation: those of regions that have
    ended are read when another one is timed, so that few events are kept however rarely times are taken, the rest when
    they are. Elsewhere a duration is wall-clock time.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def region(self, device: torch.device) -> Iterator[None]:
        """Times what runs inside on `device`."""
        if device.type == "cuda":
            while self._running and self._running[0][1].query():
                self._read_first()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._running.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._times.append(1e3 * (time.perf_counter() - begin))

    def take(self) -> list[float]:
        """The durations since the last call, in order; waits for the device to finish them."""
        while self._running:
            self._running[0][1].synchronize()
            self._read_first()
        times, self._times = self._times, []
        return times

    def _read_first(self) -> None:
        start, end = self._running.popleft()
        self._times.append(start.elapsed_time(end))
