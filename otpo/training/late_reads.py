"""Numbers on their way from the device to the host without a wait: those of a step are read in the next one."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Then = Callable[[Tensor], None]
"""What happens with a tensor once it is on the host; it may raise."""


class LateReads:
    """Brings tensors to the host and hands each to a function: at once, or inside [`step`] when it costs no wait.

    A step's tensors are copied into pinned memory behind the work that makes them, and an event follows the copies.
    The event is waited for when the step after has queued all of its own work, so that the device never runs dry. The
    last step's numbers are there after [`read`], which whoever shows or saves something has to call first.
    """

    def __init__(self) -> None:
        self._asked: list[tuple[Tensor, Then]] | None = None  # of the step that runs
        self._copied: deque[tuple[torch.cuda.Event | None, list[tuple[Tensor, Then]]]] = deque()  # steps, not yet read

    @property
    def in_step(self) -> bool:
        """Whether what is added now is read later."""
        return self._asked is not None

    def add(self, values: Tensor, then: Then) -> None:
        """Hands a tensor's values to a function: outside of a step at once, after all that was added before.

        Args:
            values: A tensor on the same device as the step's others. Nobody may write into it afterwards.
            then: Takes the values on the host. What it raises is raised by whoever reads.
        """
        if self._asked is None:
            self.read()  # whoever looks between two steps learns first what was wrong with the one before
            then(values.detach().cpu())
        else:
            self._asked.append((values.detach(), then))

    @contextmanager
    def step(self, *, late: bool = True) -> Iterator[None]:
        """What is added inside is read at the end of the next step, or by [`read`].

        An error inside may come from numbers of this step or the one before. So these are read first, and what their
        functions raise takes the error's place.

        Args:
            late: False: nothing is different inside.
        """
        if not late:
            yield
            return
        self._asked = []
        try:
            yield
        except BaseException as error:
            self._copy()
            if isinstance(error, Exception):
                self.read()
            raise
        self._copy()
        self._read_all_but(1)

    def read(self) -> None:
        """Reads all that was added, and waits for it."""
        self._read_all_but(0)

    def forget(self) -> None:
        """Drops what was added and not read, of a training that has ended otherwise."""
        self._copied.clear()

    def _copy(self) -> None:
        asked, self._asked = self._asked or [], None
        copies = [(values.to("cpu", non_blocking=True), then) for values, then in asked]  # pinned, from CUDA
        event = None
        if asked and asked[0][0].device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(asked[0][0].device))
        self._copied.append((event, copies))

    def _read_all_but(self, steps: int) -> None:
        while len(self._copied) > steps:
            event, copies = self._copied.popleft()
            if event is not None:
                event.synchronize()
            try:
                for values, then in copies:
                    then(values)
            except BaseException:
                self.forget()
                raise
