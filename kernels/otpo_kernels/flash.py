"""What torch's own flash attention kernels take, for those who call them by lengths."""

import torch

FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels take."""


def flash_can_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash kernels take such heads: half precision on a GPU of compute capability 8.0 or later.

    Args:
        device: Of the model.
        dtype: That attention is computed in, which is autocast's where it is on.
        head_dim: Width of a head.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype not in FLASH_DTYPES:
        return False
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    return capable and head_dim <= 256 and head_dim % 8 == 0 and torch.backends.cuda.is_flash_attention_available()
