"""GPUs are recognised by what their drivers call them."""

import pytest

from moe_backbone.planning.hardware import GPUS, recognise_gpu


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_known_devices(device, name):
    assert recognise_gpu(device) is GPUS[name]


def test_an_unknown_device():
    assert recognise_gpu("NVIDIA GeForce RTX 4090") is None
