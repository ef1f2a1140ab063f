"""Attention of batches that each have another length: by kernels that plan nothing."""

from contextlib import AbstractContextManager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel


def attend_at_any_length() -> AbstractContextManager[Any]:
    """Within it, torch's attention takes any of its kernels but cuDNN's.

    cuDNN makes a plan for each shape that it has not met, and answers that are written have another length at each
    token. The results are the same but for rounding.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
