"""What resuming an adapter's optimizer needs beside its tensors: a count of steps where the optimizer keeps it."""

import pytest
import torch

from moe_backbone.expert_parallel.adapter_files import check_optimizer, count_of_steps
from moe_backbone.expert_parallel.resume import ADAPTER_STATES_FILE, find_adapter_states


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_optimizers_with_a_number_for_each_number(optim):
    check_optimizer(optim)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor", "lion_32bit"])
def test_other_optimizers_are_refused(optim):
    with pytest.raises(ValueError, match=f"`optim={optim}` with an adapter.*adamw_torch, adamw_torch_fused, sgd"):
        check_optimizer(optim)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_step_finds_its_count_beside_the_parameter(fused):
    parameter = torch.zeros(3, requires_grad=True, device="cpu")
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    assert count_of_steps(optimizer, 7, parameter).device.type == "cpu"
    elsewhere = torch.empty(3, device="meta")
    count = count_of_steps(optimizer, 7, elsewhere)
    assert count.device.type == ("meta" if fused else "cpu")
    assert fused or float(count) == 7.0
    # torch's own count stands in the same place and has the same type.
    parameter.grad = torch.ones(3)
    optimizer.step()
    own = optimizer.state[parameter]["step"]
    assert (own.dtype, own.shape) == (count.dtype, count.shape)


def test_the_newest_states_are_found_by_their_number(tmp_path):
    for step in (9, 10):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / ADAPTER_STATES_FILE).touch()
    assert find_adapter_states(tmp_path) == tmp_path / "global_step10"
    assert find_adapter_states(tmp_path / "global_step9") is None
