"""Anderson acceleration of a batch of fixed-point iterations.

Source: type II of Walker and Ni 2011 (SIAM J. Numer. Anal. 49), with the normal equations scaled to a unit
diagonal. The settings are those of the solver in Triton.

Shapes: B problems, N unknowns, K remembered steps.
"""

import torch
from torch import Tensor

from otpo_kernels.acceleration import MEMORY, RESTART, RIDGE


class Anderson:
    """The memory of a batch of accelerated iterations `x <- x + f(x)`.

    Args:
        problems: B.
        unknowns: N.
        like: A tensor of the dtype and device to work in.
    """

    def __init__(self, problems: int, unknowns: int, like: Tensor) -> None:
        self._dx = like.new_zeros(problems, MEMORY, unknowns)
        self._df = like.new_zeros(problems, MEMORY, unknowns)
        self._last: tuple[Tensor, Tensor] | None = None
        self._best = like.new_full((problems,), torch.inf)
        self._slot = 0

    def next(self, x: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        """The next iterate, `x + f` less the part that the memory explains.

        Args:
            x: The iterate, `(B, N)`; unknowns that do not exist are zero here and in `f`.
            f: The step that the plain iteration would take from it, `(B, N)`.
            residual: How far each problem is from its fixed point, `(B,)`. A problem whose residual has grown past
                `RESTART` times its best one forgets its past and takes the plain step.
        """
        if self._last is not None:
            self._dx[:, self._slot] = x - self._last[0]
            self._df[:, self._slot] = f - self._last[1]
            self._slot = (self._slot + 1) % MEMORY
            keep = (residual <= RESTART * self._best)[:, None, None]
            self._dx = torch.where(keep, self._dx, 0.0)
            self._df = torch.where(keep, self._df, 0.0)
        self._last = (x, f)
        self._best = torch.minimum(self._best, residual)
        return x + f - torch.einsum("bk,bkn->bn", self._mix(f), self._dx + self._df)

    def _mix(self, f: Tensor) -> Tensor:
        """The combination of remembered steps that explains `f` best in the least-squares sense, `(B, K)`."""
        gram = torch.einsum("bkn,bln->bkl", self._df, self._df)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
        # An empty slot has scale zero: its row is the ridge alone and its share is zero.
        # In float32 products of steps are known to less than the ridge that float64 needs, and steps that are alike
        # would leave a singular matrix.
        ridge = max(RIDGE, MEMORY * torch.finfo(f.dtype).eps) * torch.eye(MEMORY, dtype=f.dtype, device=f.device)
        matrix = gram * scale[:, :, None] * scale[:, None, :] + ridge
        right = torch.einsum("bkn,bn->bk", self._df, f) * scale
        solution, _ = torch.linalg.solve_ex(matrix, right.unsqueeze(2))
        return solution.squeeze(2) * scale
