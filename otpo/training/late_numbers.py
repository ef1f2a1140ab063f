"""Arithmetic with numbers that the host does not know yet, over all processes.

Each process collects scalars of a micro-batch on its device. One exchange of all of them makes `rows`, and a
[`LateNumber`] is computed from the rows when they have come to the host.

Shapes: P processes, L scalars of a process; rows are `(P, L)` float64 on the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LateNumber:
    """A number that is known once the rows are; it can be added, divided and compared with zero before.

    Args:
        of: Computes it from the rows: a scalar tensor, or a number of Python.
    """

    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        self.of = of

    def item(self) -> "LateNumber":
        """The same as a number of Python."""
        return LateNumber(lambda rows: self.of(rows).item())

    def __add__(self, other: float) -> "LateNumber":
        """The sum with a number."""
        return LateNumber(lambda rows: self.of(rows) + other)

    __radd__ = __add__

    def __floordiv__(self, other: int) -> "LateNumber":
        """The quotient by a number, rounded down."""
        return LateNumber(lambda rows: self.of(rows) // other)

    def __truediv__(self, other: "LateNumber") -> "LateNumber":
        """The quotient, and zero where the divisor is not above zero: whoever divides has asked for that before."""

        def quotient(rows: Tensor) -> Any:
            below = other.of(rows)
            return self.of(rows) / below if below > 0 else below * 0.0

        return LateNumber(quotient)

    def __gt__(self, other: int) -> bool:
        """True: whether a divisor is above zero is settled where it divides.

        Raises:
            TypeError: It is compared with another number than zero, which can't be answered yet.
        """
        if other != 0:
            raise TypeError(f"A number that is not known yet is compared with {other}.")
        return True


class LateGathered:
    """A tensor of each process, of which a sum or a mean over all is known later.

    Args:
        numbers: Takes this process's share.
        tensor: This process's.
        processes: How many processes count, from the first on; None for all.
    """

    def __init__(self, numbers: "LocalNumbers", tensor: Tensor, processes: int | None) -> None:
        self._numbers, self._tensor, self._processes = numbers, tensor.detach(), processes

    def sum(self) -> LateNumber:
        """The sum of all elements."""
        share = self._numbers.add(self._tensor.sum(), self._processes)
        return LateNumber(lambda rows: share(rows).sum())

    def mean(self) -> LateNumber:
        """The mean of all elements, also where processes have different numbers of them."""
        share = self._numbers.add(self._tensor.mean(), self._processes)
        count = self._numbers.constant(float(self._tensor.numel()), self._processes)

        def mean(rows: Tensor) -> Tensor:
            part = count(rows) / count(rows).mean()  # exactly 1 where all have the same number
            return (share(rows) * part.to(self._tensor.dtype)).mean()

        return LateNumber(mean)


class LocalNumbers:
    """Scalars of this process, on its device, in the order in which they are added."""

    def __init__(self) -> None:
        self._scalars: list[Tensor] = []
        self._constants: dict[float, int] = {}

    def add(self, scalar: Tensor, processes: int | None = None) -> Callable[[Tensor], Tensor]:
        """Adds a scalar.

        Args:
            scalar: Of any dtype whose values float64 holds.
            processes: How many processes count, from the first on; None for all.

        Returns:
            From the rows to the scalars of the processes that count, in the scalar's dtype.
        """
        self._scalars.append(scalar)
        return self._column(len(self._scalars) - 1, processes)

    def constant(self, value: float, processes: int | None = None) -> Callable[[Tensor], Tensor]:
        """Adds a number that this process knows, once however often; as [`add`], after at least one scalar."""
        if value not in self._constants:
            self._constants[value] = len(self._scalars)
            self._scalars.append(torch.full((), value, dtype=torch.float64, device=self._scalars[0].device))
        return self._column(self._constants[value], processes)

    def row(self) -> Tensor:
        """The scalars, `(L,)` float64."""
        return torch.stack([scalar.double() for scalar in self._scalars])

    def _column(self, place: int, processes: int | None) -> Callable[[Tensor], Tensor]:
        dtype = self._scalars[place].dtype
        return lambda rows: rows[:processes, place].to(dtype)
