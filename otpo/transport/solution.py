"""What a solver gives back."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TransportWeights:
    """Token weights of a batch of pairs and how well their transport problems were solved.

    Attributes:
        chosen: `(B, M)`, non-negative, zero outside the mask, summing to `min(|y_c|, |y_r|)`.
        rejected: `(B, N)`, likewise, with the same sum.
        residual: As in [`otpo.transport.sinkhorn.Transport`], `(B,)`.
        iterations: As in [`otpo.transport.sinkhorn.Transport`].
        solver: What has run, a name of `SOLVERS`.
        solved: As in [`otpo.transport.sinkhorn.Transport`]. None where the host does not wait for the result.
    """

    chosen: Tensor
    rejected: Tensor
    residual: Tensor
    iterations: Tensor
    solver: str
    solved: Tensor | None = None
