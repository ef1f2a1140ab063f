"""The widest floating dtype of a device."""

import torch


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs (MPS), which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
