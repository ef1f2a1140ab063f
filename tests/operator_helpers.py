"""What tests of rows' operators share."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU by Triton's interpreter alone"
)
KERNEL_DEVICES = [pytest.param("cpu", marks=_INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Where a test runs kernels."""


def assert_close(got, want, tolerance):
    """Each number, against float64 on the CPU, to a share of it and of 1."""
    error = (got.cpu().double() - want).abs()
    assert (error <= tolerance * (1 + want.abs())).all(), error.max()


def backends(*modules):
    """A fixture: the kernels of operators' modules, and the plain torch that runs where Triton does not."""

    @pytest.fixture(params=["kernels", "plain torch"])
    def backend(request, monkeypatch):
        if request.param == "plain torch":
            for module in modules:
                monkeypatch.setattr(module, "runs_in_triton", lambda tensor: False)
        return request.param

    return backend
