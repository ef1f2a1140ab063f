"""Watches operators on the CPU for those that would wait for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waited(AssertionError):
    """Something would have waited for a GPU."""


class NoWaits(TorchDispatchMode):
    """Raises where a value or a size that only the device knows is asked for, while it is on.

    Also where `torch.tensor` brings a number from the host, which a GPU copies from memory that is not pinned.
    """

    _READ = (
        "lift_fresh",
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique",
        "_unique2",
        "unique_dim",
    )

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.looked_at: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.on:
            self.looked_at.add(name)
            indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
            if name in self._READ or any(each is not None and each.dtype == torch.bool for each in indices):
                raise Waited(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def pause(self) -> Iterator[None]:
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was
