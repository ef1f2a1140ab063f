"""The transport in the Triton kernels of `otpo_kernels.sinkhorn`: when they can run, and how they are called."""

import torch
from torch import Tensor

from otpo_kernels.backend import triton_is_installed

from .options import TransportOptions
from .solution import TransportWeights

_KNOWN = {"cost": ("euclidean", "cosine"), "cost_scale": ("release", "pairwise")}
"""The costs and scales that the kernels implement, whatever else is registered."""


def obstacle(chosen: Tensor, rejected: Tensor, options: TransportOptions) -> str | None:
    """Why the kernels can't run for these hidden states `(B, M, D)` and `(B, N, D)`, or None."""
    if not triton_is_installed():
        return "triton is not installed (pip install 'otpo[triton]')"
    from otpo_kernels import sinkhorn as kernels

    device = chosen.device
    if device.type != "cuda" and not kernels.INTERPRETED:
        return f"the hidden states are on '{device.type}', not on a GPU"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if chosen.dtype not in kernels.DTYPES or rejected.dtype != chosen.dtype:
        return f"hidden states of {chosen.dtype} and {rejected.dtype} are not both of one 16-bit type or float32"
    longest = max(chosen.size(1), rejected.size(1))
    if longest > kernels.LONGEST:
        return f"a row of {longest} positions is longer than {kernels.LONGEST}"
    for name, known in _KNOWN.items():
        value = getattr(options, name)
        if value not in known:
            return f"the kernels know the `{name}` {' and '.join(map(repr, known))}, not {value!r}"
    for name, least in kernels.SMALLEST.items():
        value = getattr(options, name)
        if value < least:
            return f"`{name}` {value:g} is below {least:g}, the least that float32 matrices serve"
    return None


def solve(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    options: TransportOptions,
    memory_budget: int,
) -> TransportWeights:
    """Token weights in float32; nothing waits for the device. Arguments as in [`otpo.transport.solve.solve`]."""
    from otpo_kernels.sinkhorn import token_transport

    found = token_transport(
        chosen,
        rejected,
        chosen_mask,
        rejected_mask,
        **options.numbers,
        cosine=options.cost == "cosine",
        release_scale=options.cost_scale == "release",
        memory_budget=memory_budget,
    )
    # A look at the residual on a GPU would wait for it.
    solved = found.residual <= options.tolerance if found.residual.device.type == "cpu" else None
    return TransportWeights(*found, solver="triton", solved=solved)
