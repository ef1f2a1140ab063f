"""What tests of rows' operators share: SwiGLU and cross-entropies."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_close(got, want, tolerance):
    """Each number, against float64 on the CPU, to a share of it and of 1."""
    error = (got.cpu().double() - want).abs()
    assert (error <= tolerance * (1 + want.abs())).all(), error.max()
