"""Unbalanced optimal transport in plain torch, batched over pairs: the reference of every other solver.

Shapes: B pairs, M tokens of the chosen response, N tokens of the rejected one.

For each pair the plan G solves (OTPO, arXiv 2505.18720, section 3)

    min_G  <G, C> + reg * KL(G | 1 1^T) + reg_m * (KL(G 1 | 1) + KL(G^T 1 | 1))

whose targets are vectors of ones, one unit of mass for each token, not probabilities. The solver works
on the dual potentials in the log domain, so that `reg` may go down to 0.01. Two things make it converge
in few sweeps: the translation-invariant update of Sejourne et al. 2022 (arXiv 2201.00730), since the slow
mode of unbalanced Sinkhorn is the total mass and one exact shift of the potentials removes it, and
Anderson acceleration of what is left.

Padding is masked, never replaced by zero vectors: rows and columns outside the masks carry no mass.
Nothing here is differentiable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from otpo.registry import positive

from .anderson import Anderson

# Iterations between two looks at the residual on an accelerator: each look waits for the device.
_CHECK_EVERY = 5

# Residuals stall at one to two roundings of the largest potential, measured in float32 for `reg` from 0.001 to 100,
# `reg_m` from 0.0001 to 100 and responses of 1 to 150 tokens.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Transport:
    """A solved batch of transport problems.

    Masses are kept as logarithms: they span `exp(-1 / reg_m)`, which no floating-point number holds when `reg_m` is
    small, while their shares of the whole mass are ordinary numbers.

    Attributes:
        chosen_log_mass: Logarithm of the mass that leaves each chosen token, `log G 1` `(B, M)`; `-inf` outside the
            mask.
        rejected_log_mass: Logarithm of the mass that reaches each rejected token, `log G^T 1` `(B, N)`; `-inf` outside
            the mask.
        chosen_potential: Dual potential over `reg`, `(B, M)`; `-inf` outside the mask.
        rejected_potential: Dual potential over `reg`, `(B, N)`; `-inf` outside the mask.
        residual: Largest violation of the optimality condition of a marginal, in its logarithm, `(B,)`.
        iterations: Sweeps that each pair took, `(B,)` int32.
        solved: Whether each pair's residual is within the tolerance, or within what its numbers' rounding leaves,
            `(B,)` bool.
    """

    chosen_log_mass: Tensor
    rejected_log_mass: Tensor
    chosen_potential: Tensor
    rejected_potential: Tensor
    residual: Tensor
    iterations: Tensor
    solved: Tensor

    @property
    def chosen_marginal(self) -> Tensor:
        """Mass that leaves each chosen token, `G 1` `(B, M)`; zero outside the mask, and where it underflows."""
        return self.chosen_log_mass.exp()

    @property
    def rejected_marginal(self) -> Tensor:
        """Mass that reaches each rejected token, `G^T 1` `(B, N)`, likewise."""
        return self.rejected_log_mass.exp()

    def log_plan(self, cost: Tensor, reg: float) -> Tensor:
        """Logarithm of the transport plan, `(B, M, N)`, for the `cost` and `reg` that were solved."""
        return self.chosen_potential.unsqueeze(2) + self.rejected_potential.unsqueeze(1) - cost / reg

    def plan(self, cost: Tensor, reg: float) -> Tensor:
        """The transport plan `G`, `(B, M, N)`, for the `cost` and `reg` that were solved."""
        return self.log_plan(cost, reg).exp()


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating type that the device computes in: float64, and float32 on Apple's GPUs (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def unbalanced_sinkhorn(
    cost: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    reg: float,
    reg_m: float,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Transport:
    """Solves the unbalanced transport problem of every pair at once.

    One sweep, with `a = f / reg`, `b = g / reg` and `phi = reg_m / (reg_m + reg)`:

        a_i = -phi * logsumexp_j(b_j - C_ij / reg),   b_j = -phi * logsumexp_i(a_i - C_ij / reg),

    between them the shift `a + s, b - s` that maximises the dual over translations (arXiv 2201.00730, section
    4), and Anderson's combination of the last steps of `b`. The plan that is returned belongs to `a` and the `b`
    it was computed from, so its chosen marginals satisfy their condition and the residual is that of the
    rejected ones. A pair that has converged is left alone, so its result does not depend on its company.

    On an accelerator the residual is looked at every fifth sweep, so the loop waits for the device that
    often and no oftener.

    Args:
        cost: `(B, M, N)`, non-negative, finite, float64 or float32; the dtype of the work and the result.
        chosen_mask: `(B, M)` bool.
        rejected_mask: `(B, N)` bool. A pair with an empty side gets no mass, residual zero.
        reg: Weight of the entropy term, > 0; down to 0.01 for costs in [0, 1].
        reg_m: Weight of the two marginal terms, > 0.
        tolerance: A pair is done when its residual is at most this, or four roundings of its largest potential, below
            which nothing is gained: that is 5e-7 to 5e-5 in float32 for `reg` from 1 to 0.01 and `reg_m` up to 1, and
            more than 1e-6 in float64 only where potentials over `reg` pass 1e9.
        max_iterations: Sweeps at most; the residual says what was reached.

    Raises:
        ValueError: `reg` or `reg_m` is not a positive finite number.
    """
    positive("reg", reg)
    positive("reg_m", reg_m)
    phi = reg_m / (reg_m + reg)
    ratio = reg / reg_m
    kernel = cost / -reg
    rows = chosen_mask & rejected_mask.any(1, keepdim=True)
    columns = rejected_mask & chosen_mask.any(1, keepdim=True)
    b = torch.zeros_like(kernel[:, 0, :])
    memory = Anderson(len(b), b.size(1), b)
    iterations = torch.zeros(len(b), dtype=torch.int32, device=b.device)
    active = torch.ones_like(iterations, dtype=torch.bool)
    rounding = _ROUNDINGS * torch.finfo(cost.dtype).eps
    check_every = 1 if cost.device.type == "cpu" else _CHECK_EVERY

    for iteration in range(1, max_iterations + 1):
        a = -phi * _masked_logsumexp(kernel, b.masked_fill(~columns, -torch.inf).unsqueeze(1), 2, rows)
        lse = _masked_logsumexp(kernel, a.masked_fill(~rows, -torch.inf).unsqueeze(2), 1, columns)
        residual = (lse + b / phi).abs().amax(1)
        iterations += active
        largest = torch.maximum(a.abs().amax(1), b.abs().amax(1) / phi).clamp(min=1.0)
        enough = (rounding * largest).clamp(min=tolerance)
        solved = residual <= enough
        active = residual > enough  # no more of a pair that holds a NaN
        if iteration == max_iterations or (iteration % check_every == 0 and not active.any()):
            break
        shift = _mass_shift(a, b, rows, columns, ratio)
        shifted = (b - shift).masked_fill(~columns, 0.0)
        step = (-phi * (lse + shift) - shifted).masked_fill(~columns, 0.0)
        b = torch.where(active.unsqueeze(1), memory.next(shifted, step, residual), b)
    return Transport(
        chosen_log_mass=a.mul(-ratio).masked_fill(~rows, -torch.inf),
        rejected_log_mass=(b + lse).masked_fill(~columns, -torch.inf),
        chosen_potential=a.masked_fill(~rows, -torch.inf),
        rejected_potential=b.masked_fill(~columns, -torch.inf),
        residual=residual,
        iterations=iterations,
        solved=solved,
    )


def _masked_logsumexp(kernel: Tensor, potential: Tensor, dim: int, valid: Tensor) -> Tensor:
    return torch.logsumexp(kernel + potential, dim).masked_fill(~valid, 0.0)


def _mass_shift(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, ratio: float) -> Tensor:
    """The translation of `a` (and of `b`, negated) that is optimal for the dual, `(B, 1)`."""
    mass_a = torch.logsumexp((a * -ratio).masked_fill(~rows, -torch.inf), 1, keepdim=True)
    mass_b = torch.logsumexp((b * -ratio).masked_fill(~columns, -torch.inf), 1, keepdim=True)
    return torch.where(rows.any(1, keepdim=True), (mass_a - mass_b) / (2.0 * ratio), 0.0)
