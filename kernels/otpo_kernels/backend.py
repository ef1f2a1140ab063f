"""Which backend runs an op: Triton or its torch reference. No Triton here, so that machines without it can ask."""

import functools
import os
from importlib.util import find_spec

from torch import Tensor


def runs_in_triton(tensor: Tensor) -> bool:
    """True on a GPU, and on the CPU when Triton interprets its kernels there (TRITON_INTERPRET=1)."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def triton_is_installed() -> bool:
    """Whether the kernels can be imported at all."""
    return find_spec("triton") is not None
