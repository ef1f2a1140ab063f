"""Watches operators on the CPU for those that would wait for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter


class Waited(AssertionError):
    """Something would have waited for a GPU."""


class NoWaits(TorchDispatchMode):
    """Raises where a value or a size that only the device knows is asked for, while it is on.

    Also where `torch.tensor` brings a number from the host, which a GPU copies from memory that is not pinned, where
    an operator's kernels for a GPU ask by themselves, which those for the CPU need not, and where a tensor is brought
    to the host, for which one that is there needs no operator. What a loader of batches does is on the host anyway.
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
        "unique_consecutive",
        "bincount",
        "_linalg_check_errors",
    )
    # By a number in a tensor, which kernels for a GPU read.
    _FILLS = ("masked_fill", "masked_fill_", "index_fill", "index_fill_")

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.looked_at: set[str] = set()
        self._to_host = _ToHost(self)
        loads = _SingleProcessDataLoaderIter._next_data

        def load(loader: Any) -> Any:
            with self.pause():
                return loads(loader)

        self._loading = patch.object(_SingleProcessDataLoaderIter, "_next_data", load)

    def __enter__(self) -> "NoWaits":
        super().__enter__()
        self._to_host.__enter__()
        self._loading.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._loading.stop()
        self._to_host.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.on:
            self.looked_at.add(name)
            indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
            by_mask = any(each is not None and each.dtype == torch.bool for each in indices)
            filled = name in self._FILLS and isinstance(args[-1], Tensor)
            counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
            if name in self._READ or by_mask or filled or counted:
                raise Waited(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def pause(self) -> Iterator[None]:
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was


class _ToHost(TorchFunctionMode):
    """Sees the methods that bring a tensor to the host, on behalf of a watch."""

    _METHODS = (Tensor.cpu, Tensor.numpy, Tensor.tolist)

    def __init__(self, watch: NoWaits) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._watch.on and func in self._METHODS:
            raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))
