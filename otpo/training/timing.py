"""Times of regions of device work, read without making the training step wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTimer:
    """Collects the durations of timed regions in milliseconds.

    On CUDA a region is a pair of events in the stream; they are read when the times are taken, so a region
    costs no synchronisation. Elsewhere it is wall-clock time.
    """

    def __init__(self) -> None:
        self._regions: list[float | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def region(self, device: torch.device) -> Iterator[None]:
        """Times what runs inside on `device`."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._regions.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._regions.append(1e3 * (time.perf_counter() - begin))

    def take(self) -> list[float]:
        """The durations since the last call, in order; waits for the device to finish them."""
        times = []
        for region in self._regions:
            if isinstance(region, tuple):
                start, end = region
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                times.append(region)
        self._regions.clear()
        return times
